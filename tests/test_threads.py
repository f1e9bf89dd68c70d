"""A model that many threads use at once gives each of them what it gives alone."""

import asyncio
import copy
import pickle
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import OnStep, make_trainer, outcome, pattern_dataset
from test_bank import TECHNIQUES, bank_of, images, random_experts, small_backbone
from transformers import PreTrainedModel, pipeline

from hf_clpeft import ContinualModel, ExpertBank, ExpertError, HfClpeftError, l2l, load_backbone, s_lora
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.experts.expert import make_peft_config
from hf_clpeft.experts.lock import ReadWriteLock
from hf_clpeft.export import export_merged
from hf_clpeft.streams import TaskStream
from hf_clpeft.streams.images import open_image


BUNDLED = ["s-lora", "s-lora-pp", "s-prompts", "s-lora-mix", "l2l", "l2p"]
THREADS = 8


@pytest.fixture(autouse=True)
def _many_switches():
    """Threads take lock two hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 200)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def pictures():
    paths = sorted((bundled_folder("hf-clpeft/s-lora-digits") / "examples").glob("*.png"))
    return [open_image(path) for path in paths]


def at_once(jobs):
    """What jobs give that threads start together; raises what one of them raises."""
    jobs = list(jobs)
    start = threading.Barrier(min(THREADS, len(jobs)))
    with ThreadPoolExecutor(THREADS, initializer=start.wait, initargs=(60,)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def while_running(job, others):
    """Runs a job in a thread of its own; what `others` gives over and over until it has ended."""
    with ThreadPoolExecutor(1) as pool:
        future, found = pool.submit(job), []
        while not future.done():
            found.append(others())
        future.result()
    return found


def answers(predictions):
    return [(p.label, p.expert, round(p.score, 4), round(p.distance, 4)) for p in predictions]


@pytest.mark.parametrize("name", BUNDLED)
def test_eight_threads_get_the_answers_of_one(name, pictures):
    model = ContinualModel.from_pretrained(f"hf-clpeft/{name}-digits")
    forced = [None, *model.bank.names] if model.method.independent else [None]
    calls = [
        (pictures[i % 7 : i % 7 + 1 + i % 3], {"batch_size": 1 + i % 2, "expert": forced[i % len(forced)], "top_k": 3})
        for i in range(16)
    ]
    alone = [answers(model.predict(batch, **options)) for batch, options in calls]
    jobs = [lambda batch=batch, options=options: answers(model.predict(batch, **options)) for batch, options in calls]
    assert at_once(jobs) == alone

    async def serve():
        waiting = (asyncio.to_thread(model.predict, batch, **options) for batch, options in calls)
        return [answers(predictions) for predictions in await asyncio.gather(*waiting)]

    assert asyncio.run(serve()) == alone


BANKS = {
    "gathered": (
        "gathered",
        [{"peft_type": "LORA", "r": rank, "target_modules": ["fc1", "q_proj"]} for rank in (1, 3)],
    ),
    "stacked": ("stacked", [{"peft_type": "LORA", "r": 2}] * 3),
    "prompts": ("auto", [{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}] * 3),
    "prompts of two lengths": ("auto", [{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": n} for n in (1, 3)]),
    "ia3": ("auto", [TECHNIQUES["ia3"]] * 3),
    "dora": ("auto", [TECHNIQUES["dora"]] * 2),
}


@pytest.mark.parametrize("form, arguments", BANKS.values(), ids=BANKS)
def test_banks_on_one_backbone_do_not_hear_of_each_other(form, arguments):
    experts = random_experts(small_backbone(), arguments)
    bank = bank_of(experts, form)
    other = ExpertBank(bank.backbone, form)
    other.extend(random_experts(small_backbone(), arguments, seed=1))
    jobs, layers = [], [None, 1, [1, 2]]
    for i in range(24):
        selection = torch.randint(len(experts), (1 + i % 3,), generator=torch.Generator().manual_seed(i))
        options = {"layers": layers[i % 3]}
        owner = bank if i % 2 else other
        jobs.append(lambda s=selection, o=options, b=owner, i=i: b(images(len(s), i), s, **o).detach())
        jobs.append(lambda s=selection, o=options, i=i: bank.frozen(images(len(s), i), **o))
    alone = [job() for job in jobs]
    for found, expected in zip(at_once(jobs), alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("technique", ["lora", "ia3"])
def test_a_bank_answers_while_another_thread_adds_and_removes_experts(technique):
    arguments = {"lora": {"peft_type": "LORA", "r": 2}, **TECHNIQUES}[technique]
    experts = random_experts(small_backbone(), [arguments] * 12)
    bank, selection = bank_of(experts[:2]), torch.tensor([0, 1, 0])
    with torch.no_grad():
        before = bank(images(3), selection)

        def change():
            for expert in experts[2:]:
                bank.extend([expert])
                bank.start("new", expert.config)
                bank.finish("new")
                bank.remove("new")

        assert all(torch.equal(found, before) for found in while_running(change, lambda: bank(images(3), selection)))
        assert len(bank) == 12
        assert torch.equal(
            bank(images(3), torch.tensor([11, 11, 11])), bank_of(experts)(images(3), torch.tensor([11] * 3))
        )


def two_tasks():
    return TaskStream.class_incremental(pattern_dataset(), num_tasks=2)


LEARNING = {
    "lora": s_lora(k=2),
    "grouped": s_lora(k=2, lora={"use_dora": True}),
}


@pytest.mark.parametrize("method", LEARNING.values(), ids=LEARNING)
def test_others_predict_and_save_while_a_task_is_learnt(method, tmp_path):
    trainer, stream = make_trainer(method, num_train_epochs=4), two_tasks()
    trainer.learn(stream[0])
    model, pictures = trainer.model, [row["image"] for row in pattern_dataset()["test"]][::2]
    before, found, saved = answers(model.predict(pictures)), [], []

    def others():
        folder = tmp_path / f"saved-{len(saved)}"
        model.save_pretrained(folder)
        saved.append(folder)
        return answers(model.predict(pictures))

    found = while_running(lambda: trainer.learn(stream[1]), others)
    after = answers(model.predict(pictures))
    assert before != after and before in found and all(answer in (before, after) for answer in found)
    for folder in (saved[0], saved[len(saved) // 2], saved[-1]):
        assert answers(ContinualModel.from_pretrained(folder).predict(pictures)) in (before, after)


def test_a_pool_in_training_is_refused_to_other_threads():
    trainer, stream = make_trainer(l2l(pool_size=4, top_n=2), num_train_epochs=4), two_tasks()
    trainer.learn(stream[0])
    model, pictures = trainer.model, [row["image"] for row in pattern_dataset()["test"]][::2]

    def others():
        try:
            return answers(model.predict(pictures))
        except HfClpeftError as error:
            return str(error)

    before = others()
    found = while_running(lambda: trainer.learn(stream[1]), others)
    refused = [answer for answer in found if isinstance(answer, str)]
    assert "Another thread is training the pool in this model" in refused[0]
    assert all(answer in (before, others()) for answer in found if answer not in refused)


def test_one_thread_learns_at_a_time_and_a_failed_one_leaves_room_for_the_next():
    stream = two_tasks()
    other = make_trainer(s_lora(k=2), "other")
    reached, go_on = threading.Event(), threading.Event()

    def on_step(step, steps):
        if not go_on.is_set():
            reached.set()
            assert go_on.wait(60)
            raise RuntimeError("as planned")

    trainer = make_trainer(s_lora(k=2), callbacks=[OnStep(on_step)])
    other.model = trainer.model
    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(trainer.learn, stream[0])
        assert reached.wait(60)
        with pytest.raises(ExpertError, match="Another thread is training task-000 in this model, and one task"):
            other.learn(stream[1])
        with pytest.raises(ExpertError, match="Another thread is training"):
            trainer.model.start_task("mine", ["cat", "dog"])
        go_on.set()
        with pytest.raises(RuntimeError, match="as planned"):
            learning.result()
        trainer.learn(stream[0])  # while the thread that failed lives on
    assert trainer.model.bank.slot is None and len(trainer.model.config.tasks) == 1


def test_what_another_thread_asks_for_while_a_task_is_learnt_is_refused_and_changes_nothing():
    stream, refused = two_tasks(), []
    make_trainer(s_lora(k=2), "alone").learn_stream(stream)

    def on_step(step, steps):
        model = trainer.model
        with ThreadPoolExecutor(1) as pool:
            removals = [lambda name=task.name: model.remove(name) for task in model.config.tasks]
            for job in [lambda: model.start_task("mine", ["cat"]), *removals]:
                with pytest.raises(ExpertError, match="Another thread is training"):
                    pool.submit(job).result()
                refused.append(job)

    trainer = make_trainer(s_lora(k=2), callbacks=[OnStep(on_step)])
    trainer.learn_stream(stream)
    assert len(refused) > 4 and outcome("out") == outcome("alone")


def test_pipelines_and_exports_run_in_threads(pictures, tmp_path):
    model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    classify = pipeline("image-classification", model=model, image_processor=model.backbone.processor)

    def through_pipeline(i):
        return [answer[0]["label"] for answer in classify([pictures[i % 10], pictures[-i % 10]], top_k=1)]

    def export(i):
        export_merged(model, model.config.tasks[i % 5].name, tmp_path / str(i))

    alone = [through_pipeline(i) for i in range(12)]
    jobs = [lambda i=i: through_pipeline(i) for i in range(12)]
    assert at_once([*jobs, *(lambda i=i: export(i) for i in range(3))])[:12] == alone
    merged = pipeline("image-classification", str(tmp_path / "1"))
    expected = [merged(picture)[0]["score"] for picture in pictures]
    assert at_once([lambda p=p: merged(p)[0]["score"] for p in pictures]) == pytest.approx(expected, abs=1e-4)


def test_threads_that_save_one_model_into_folders_of_their_own_write_the_same(tmp_path):
    model = ContinualModel.from_pretrained("hf-clpeft/s-prompts-digits")
    model.unchanged.clear()
    at_once([lambda i=i: model.save_pretrained(tmp_path / str(i)) for i in range(4)])
    configs = {Path(tmp_path, str(i), "config.json").read_bytes() for i in range(4)}
    assert len(configs) == 1 and ContinualModel.from_pretrained(tmp_path / "3").bank.names == model.bank.names


def test_a_task_that_is_removed_is_gone_between_two_batches_and_not_within_one(pictures):
    model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    last = model.config.tasks[-1].name
    before = answers(model.predict(pictures, top_k=2))
    found = while_running(lambda: model.remove(last), lambda: answers(model.predict(pictures, top_k=2)))
    assert all(answer in (before, answers(model.predict(pictures, top_k=2))) for answer in found)


def test_training_does_not_touch_the_backbone_that_others_run():
    backbone = small_backbone()
    bank = ExpertBank(backbone)
    slot = bank.start("new", make_peft_config({"peft_type": "LORA", "r": 1}, backbone)).train()
    assert not any(module.training for module in backbone.model.modules())
    assert not any("lora" in name for name, _ in backbone.named_modules())
    assert slot.get_base_model().layernorm.weight is backbone.model.layernorm.weight  # no second copy in memory
    bank.to(torch.bfloat16)
    assert slot.get_base_model().layernorm.weight.dtype == torch.bfloat16


def test_banks_that_threads_make_on_one_backbone_hook_it_once():
    experts, backbone = random_experts(small_backbone(), [{"peft_type": "LORA", "r": 1}] * 2), small_backbone()
    expected = bank_of(experts)(images(2), torch.tensor([0, 1]))

    def make():
        bank = ExpertBank(backbone)
        bank.extend(experts)
        return bank(images(2), torch.tensor([0, 1]))

    assert all(torch.equal(found, expected) for found in at_once([make] * 16))
    assert {len(m._forward_hooks) for m in backbone.modules() if isinstance(m, torch.nn.Linear)} == {0, 1}


def test_readers_share_and_writers_are_alone():
    lock, inside = ReadWriteLock(), []

    def read():
        with lock.reading(), lock.reading():
            inside.append(1)
            assert "writing" not in inside
            inside.remove(1)

    def write():
        with lock.writing(), lock.reading(), lock.writing():
            assert not inside
            inside.append("writing")
            inside.remove("writing")

    at_once([write if i % 4 == 0 else read for i in range(400)])
    with lock.reading(), pytest.raises(RuntimeError, match="cannot acquire it for writing"), lock.writing():
        pass
    with lock.writing():  # copies are free
        both = [copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))]
        at_once([lambda t=t: t.writing().__enter__() for t in both])


def test_threads_that_load_backbones_leave_torch_as_it_was(tmp_path):
    shutil.copytree(bundled_folder("hf-clpeft/vit-tiny-glyphs"), tmp_path / "vit")
    before = torch.linspace, torch.nn.init.normal_, PreTrainedModel.tie_weights
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=load_backbone, args=(str(tmp_path / "vit"),)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert (torch.linspace, torch.nn.init.normal_, PreTrainedModel.tie_weights) == before
