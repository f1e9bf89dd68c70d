"""Inside a task, too, a run goes on as if nothing had happened."""

import dataclasses
import json
import logging
import random
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONE, OnStep, make_trainer, outcome, pattern_dataset
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image as ImageColumn
from PIL import Image

from hf_clpeft import (
    Batch,
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    TaskStream,
    l2l,
    ranpac_first,
    s_lora,
    s_prompts,
    sequential_lora,
)
from hf_clpeft.training.batches import EpochBatches
from hf_clpeft.training.checkpoints import random_state, set_random_state
from hf_clpeft.training.steps import TrainingError, TrainingStopped


pytestmark = pytest.mark.usefixtures("shallow")
OPTIONS = {"augmentation": "crop_flip", "save_steps": 2, "train_batch_size": 5, "resume_from_checkpoint": "auto"}


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(per_class=6), num_tasks=2)


def begin(method, folder, stop_after, **options):
    """Trains until so many optimizer steps are done, then dies without a word."""
    steps = []

    def die(done, total):
        steps.append(done)
        if len(steps) == stop_after:
            raise RuntimeError("killed")

    return make_trainer(method, folder, **{**OPTIONS, **options}, callbacks=[OnStep(die)])


def resume(method, folder, callbacks=(), **options):
    there = Path(folder, "config.json").is_file()
    model = ContinualModel.from_pretrained(folder) if there else ContinualModel.from_backbone(BACKBONE, method)
    return ContinualTrainer(model, make_trainer(method, folder, **{**OPTIONS, **options}).args, callbacks)


METHODS = {
    "s_lora": s_lora(k=2),
    "l2l": l2l(pool_size=4, top_n=2),
    "sequential_lora": sequential_lora(),
    "ranpac_first": ranpac_first(projection_size=50),
}


@pytest.fixture(scope="module")
def undisturbed(stream, tmp_path_factory):
    """What a run of each method ends with if nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, method in METHODS.items():
        make_trainer(method, folder / name, **OPTIONS).learn_stream(stream)
    return {name: outcome(folder / name) for name in METHODS}


# 12 images in batches of 5: three steps an epoch, the last one of a part; two epochs, six steps a task.
@pytest.mark.parametrize(
    "name, stop_after",
    [
        *(("s_lora", step) for step in (1, 3, 4, 5, 6, 9)),
        *((name, step) for name in ("l2l", "sequential_lora") for step in (4, 11)),
        ("ranpac_first", 4),
    ],
)
def test_a_run_that_died_inside_a_task_ends_like_one_that_did_not(name, stop_after, undisturbed, stream, tmp_path):
    method = METHODS[name]
    with pytest.raises(RuntimeError, match="killed"):
        begin(method, tmp_path / "pieces", stop_after).learn_stream(stream)
    steps = []
    trainer = resume(method, tmp_path / "pieces", callbacks=[OnStep(lambda done, total: steps.append(done))])
    trainer.learn_stream(stream)
    assert outcome(tmp_path / "pieces") == undisturbed[name]
    saved = (stop_after % 6 - 1) // 2 * 2 if stop_after % 6 else 4  # a step whose state was saved before it died
    assert steps[0] == saved + 1
    assert not (tmp_path / "pieces" / "checkpoints").exists()


@pytest.mark.parametrize(
    "options", [{"optim": "sgd", "augmentation_views": 2}, {"gradient_accumulation_steps": 2, "save_steps": 1}]
)
def test_other_optimizers_and_accumulated_batches_go_on_too(options, stream, tmp_path):
    method = s_prompts(prompt_length=2, k=2)
    make_trainer(method, tmp_path / "whole", **{**OPTIONS, **options}).learn_stream(stream)
    with pytest.raises(RuntimeError, match="killed"):
        begin(method, tmp_path / "pieces", 3, **options).learn_stream(stream)
    resume(method, tmp_path / "pieces", **options).learn_stream(stream)
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed, stream, tmp_path, caplog):
    method = METHODS["s_lora"]
    with pytest.raises(RuntimeError):
        begin(method, tmp_path / "pieces", 5).learn_stream(stream)
    older, newest = sorted((tmp_path / "pieces" / "checkpoints").iterdir())
    file = newest / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    steps = []
    trainer = resume(method, tmp_path / "pieces", callbacks=[OnStep(lambda done, total: steps.append(done))])
    with caplog.at_level(logging.WARNING):
        trainer.learn_stream(stream)
    assert steps[0] == 3 and "is damaged (state.safetensors does not match its hash)" in caplog.text
    assert outcome(tmp_path / "pieces") == undisturbed["s_lora"]


def test_a_checkpoint_of_another_run_is_not_gone_on_with(stream, tmp_path):
    with pytest.raises(RuntimeError):
        begin(s_lora(k=2), tmp_path / "run", 5).learn_stream(stream)
    shutil.copytree(tmp_path / "run", tmp_path / "fresh")
    with pytest.raises(ConfigError, match=r"state of an interrupted run \(checkpoints/task-000-00000004\)"):
        make_trainer(s_lora(k=2), tmp_path / "fresh", **{**OPTIONS, "resume_from_checkpoint": None}).learn(stream[0])
    for folder, options in (
        ("run", {"learning_rate": 1e-3}),
        ("fresh", {"resume_from_checkpoint": None, "overwrite_output_dir": True}),
    ):
        steps = []
        trainer = make_trainer(
            s_lora(k=2),
            tmp_path / folder,
            **{**OPTIONS, **options},
            callbacks=[OnStep(lambda done, total, steps=steps: steps.append(done))],
        )
        trainer.learn(stream[0])
        assert steps[0] == 1


def other_pictures(per_class=6, **changes):
    """The data set of `stream`, or one that somebody has edited."""
    data = pattern_dataset(per_class=per_class)
    rows = data["train"].to_dict()
    images, labels, names = list(data["train"]["image"]), rows["label"], data["train"].features["label"].names
    if changes.get("one"):
        pixels = np.array(images[7])
        pixels[5, 5, 0] ^= 1
        images[7] = Image.fromarray(pixels)
    if changes.get("swapped"):
        images[0], images[1] = images[1], images[0]
    if changes.get("relabelled"):
        labels[0], labels[per_class] = labels[per_class], labels[0]
    if changes.get("renamed"):
        names = [f"kind {name}" for name in names]
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=names)})
    test = {"image": list(data["test"]["image"]), "label": data["test"]["label"][:]}
    sides = {"train": {"image": images, "label": labels}, "test": test}
    sides = {side: Dataset.from_dict(columns, features) for side, columns in sides.items()}
    return TaskStream.class_incremental(DatasetDict(sides), num_tasks=2)


@pytest.mark.parametrize("room", [{}, {"cache_size_gb": 2e-5}], ids=["cached", "streamed"])
@pytest.mark.parametrize("change", [None, "one", "swapped", "relabelled", "renamed"])
def test_a_state_is_gone_on_with_on_the_same_pictures_only(change, room, tmp_path, caplog):
    if room and change in ("one", "swapped"):
        pytest.skip("of what is streamed, a sample is looked at")
    with pytest.raises(RuntimeError, match="killed"):
        begin(s_lora(k=1), tmp_path / "run", 5, **room).learn(other_pictures()[0])
    steps = []
    trainer = make_trainer(
        s_lora(k=1),
        tmp_path / "run",
        **{**OPTIONS, **room},
        callbacks=[OnStep(lambda done, total: steps.append(done))],
    )
    with caplog.at_level(logging.WARNING):
        trainer.learn(other_pictures(**{change or "": True})[0])
    assert steps[0] == (5 if change is None else 1)
    told = "other classes" if change == "renamed" else "other training images"
    assert (told in caplog.text and "task-000 is trained anew" in caplog.text) == (change is not None)


def test_experts_that_were_trained_in_parallel_are_taken_up_on_the_same_pictures_only(tmp_path):
    steps, options = [], {**OPTIONS, "task_parallel": True, "num_train_epochs": 1}

    def die(done, total):
        steps.append(done)
        if len(steps) == total + 1:
            raise RuntimeError("killed")

    trainer = make_trainer(s_lora(k=1), tmp_path, **options, callbacks=[OnStep(die)])
    with pytest.raises(RuntimeError, match="killed"):
        trainer.learn_stream(other_pictures())
    trainer = make_trainer(
        s_lora(k=1), tmp_path, **options, callbacks=[OnStep(lambda done, total: steps.append(done))]
    )
    count = len(steps)
    trainer.learn_stream(other_pictures(one=True))
    assert len(steps) - count == 2 * 3  # three steps a task, of both tasks


def test_tasks_learnt_otherwise_and_tested_on_other_pictures_are_told_of(tmp_path, caplog):
    make_trainer(s_lora(k=1), tmp_path, **OPTIONS).learn(other_pictures()[0])
    stream = other_pictures()
    halved = dataclasses.replace(stream[0].test, dataset=stream[0].test.dataset.select(range(4)))
    edited = TaskStream([dataclasses.replace(stream[0], test=halved), stream[1]])
    with caplog.at_level(logging.WARNING):
        resume(s_lora(k=1), tmp_path, seed=7, learning_rate=1e-3).learn_stream(edited)
    assert "learnt with learning_rate=0.005, not 0.001, seed=0, not 7" in caplog.text
    assert "task-000 was tested on other images before" in caplog.text
    caplog.clear()
    resume(s_lora(k=1), tmp_path, seed=7, learning_rate=1e-3).learn_stream(edited)
    assert not caplog.text  # these are the ones by now


def test_a_full_disk_is_seen_before_a_state_is_written_and_told_in_one_line(stream, tmp_path, monkeypatch):
    from hf_clpeft.config.errors import errors_in_one_line

    with pytest.raises(RuntimeError):
        begin(s_lora(k=2), tmp_path, 3).learn(stream[0])
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    trainer = make_trainer(s_lora(k=2), tmp_path, **OPTIONS)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        patch.setattr(Path, "write_bytes", lambda path, data: pytest.fail("written"))
        with pytest.raises(SystemExit) as end, errors_in_one_line():
            trainer.learn(stream[0])
    wanted = r"error: .*task-000-00000004 could not be saved \(No space left on device: [\d,]+ bytes needed, 100,0"
    assert re.match(wanted, str(end.value)) and str(end.value).endswith("--resume_from_checkpoint auto.")
    write_bytes = Path.write_bytes

    def full(path, data):
        if "state" in path.name:
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    with monkeypatch.context() as patch:  # by somebody else, meanwhile
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="task-000-00000004 could not be saved .*No space left on device"):
            make_trainer(s_lora(k=2), tmp_path, **OPTIONS).learn(stream[0])
    after = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert after == before
    steps = []
    trainer = make_trainer(
        s_lora(k=2), tmp_path, **OPTIONS, callbacks=[OnStep(lambda done, total: steps.append(done))]
    )
    trainer.learn(stream[0])
    assert steps[0] == 3


def test_asked_to_stop_it_saves_and_goes_on_from_there(undisturbed, stream, tmp_path):
    method, options = METHODS["s_lora"], {"save_steps": 0}
    trainer = make_trainer(
        method,
        tmp_path / "pieces",
        **{**OPTIONS, **options},
        callbacks=[OnStep(lambda done, total: trainer.stop.set() if done == 3 else None)],
    )
    with pytest.raises(TrainingStopped):
        trainer.learn_stream(stream)
    resume(method, tmp_path / "pieces", **options).learn_stream(stream)
    assert outcome(tmp_path / "pieces") == undisturbed["s_lora"]


def test_a_signal_ends_a_recipe_with_the_command_that_goes_on(tmp_path):
    import signal
    import subprocess
    import sys
    import time

    repo = Path(__file__).parents[1]
    command = [sys.executable, str(repo / "recipes" / "s_lora.py"), "--benchmark", "digits", "--disable_tqdm"]
    command += ["--output_dir", str(tmp_path / "out"), "--save_steps", "1", "--num_train_epochs", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/checkpoints/task-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors[-2000:]
    assert output.strip().endswith("--resume_from_checkpoint auto") and "s_lora.py" in output


def test_the_newest_states_are_kept(stream, tmp_path):
    with pytest.raises(RuntimeError):
        begin(s_lora(k=2), tmp_path, 6, save_steps=1, save_total_limit=3).learn(stream[0])
    kept = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == ["task-000-00000003", "task-000-00000004", "task-000-00000005"]


def test_random_generators_go_on_where_they_were():
    state = random_state()
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    text = json.dumps(state[1])
    set_random_state(state[0], json.loads(text))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn


def test_every_epoch_has_each_image_once_and_an_order_of_its_own():
    batches = EpochBatches(num_images=11, batch_size=4, seed=0)
    orders = []
    for batches.epoch in range(3):
        orders.append([index for batch in batches for index in batch])
        assert sorted(orders[-1]) == list(range(11))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("num_images, num_processes", [(11, 2), (65, 2), (17, 3), (3, 2), (1, 4), (16, 4)])
def test_processes_share_each_batch_row_by_row_and_fill_up_with_what_counts_for_nothing(num_images, num_processes):
    alone = list(EpochBatches(num_images, batch_size=16, seed=0))
    of_each = [EpochBatches(num_images, 16, 0, rank, num_processes) for rank in range(num_processes)]
    for number, rows in enumerate(alone):
        parts = [list(batches)[number] for batches in of_each]
        shares = [batches.share(number) for batches in of_each]
        assert len({len(part) for part in parts}) == 1 and parts[0]
        assert sum((part[: share.size] for part, share in zip(parts, shares, strict=True)), []) == rows
        views = torch.arange(len(rows))
        for part, share in zip(parts, shares, strict=True):
            weights = share.weights(len(part), num_processes)
            assert weights.count_nonzero() == share.size and share.total == len(rows)
            assert [rows[view] for view in share.own(views, len(part))][: share.size] == part[: share.size]
        total = sum(share.weights(len(parts[0]), num_processes).sum() for share in shares) / num_processes
        assert total == pytest.approx(1)


@pytest.mark.parametrize("make", [partial(s_lora, k=2), partial(l2l, pool_size=4, top_n=2), sequential_lora])
def test_a_loss_that_is_not_finite_ends_the_task_and_leaves_the_model_as_it_was(make, stream, tmp_path):
    trainer = make_trainer(make(), tmp_path, **OPTIONS)
    trainer.learn(stream[0])
    before, weights = outcome(tmp_path), {name: w.clone() for name, w in trainer.model.state_dict().items()}
    trainer.args.learning_rate = float("inf")
    with pytest.raises(TrainingError, match="loss of task-001 was not finite at step .* Lower learning_rate"):
        trainer.learn(stream[1])
    assert outcome(tmp_path) == before and len(ContinualModel.from_pretrained(tmp_path).config.tasks) == 1
    assert all(torch.equal(weights[name], weight) for name, weight in trainer.model.state_dict().items())
    resume(make(), tmp_path).learn(stream[1])
    assert len(ContinualModel.from_pretrained(tmp_path).config.tasks) == 2


@pytest.mark.parametrize("name", METHODS)
def test_a_task_that_fails_at_its_end_leaves_the_model_as_it_was(name, undisturbed, stream, tmp_path, monkeypatch):
    trainer = make_trainer(METHODS[name], tmp_path, **OPTIONS)
    for position, task in enumerate(stream):
        method, end = trainer.model.method, trainer.model.method.end
        before = {name: weight.clone() for name, weight in method.state_dict().items()}

        def failing(features_of, end=end):
            end(features_of)
            raise RuntimeError("as planned")

        with monkeypatch.context() as patch:
            patch.setattr(method, "end", failing)
            with pytest.raises(RuntimeError, match="as planned"):
                trainer.learn(task)
        after = method.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert len(trainer.model.config.tasks) == position and method.task is None
        trainer.learn(task)
    assert outcome(tmp_path) == undisturbed[name]


def test_two_runs_in_one_folder_are_refused(stream, tmp_path):
    other = make_trainer(s_lora(k=2), tmp_path, overwrite_output_dir=True)
    refused = []

    def meanwhile(done, total):
        with pytest.raises(ConfigError, match="Another run is writing into"):
            other.learn(stream[1])
        refused.append(done)

    make_trainer(s_lora(k=2), tmp_path, **OPTIONS, callbacks=[OnStep(meanwhile)]).learn(stream[0])
    assert refused and len(other.model.config.tasks) == 0
    other.learn(stream[1])


def test_a_batch_that_does_not_fit_into_memory_is_added_up_in_parts(stream, tmp_path, monkeypatch, caplog):
    experts, largest = [], 2
    for folder, room in (("roomy", 100), ("tight", largest)):
        trainer = make_trainer(s_lora(k=2), tmp_path / folder, train_batch_size=8, gradient_accumulation_steps=2)
        loss = trainer.model.method.loss

        def scarce(batch, loss=loss, room=room):
            if len(batch.pixels) > room:
                raise torch.OutOfMemoryError
            return loss(batch)

        monkeypatch.setattr(trainer.model.method, "loss", scarce)
        trainer.learn(stream[0])
        experts.append(trainer.model.bank[0].tensors)
    assert "batches in 4 parts" in caplog.text
    for key, tensor in experts[0].items():
        torch.testing.assert_close(tensor, experts[1][key], atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(trainer.model.method, "loss", lambda _: scarce(Batch(torch.zeros(3), torch.zeros(3))))
    with pytest.raises(TrainingError, match="too little memory for a batch of 8 images"):
        trainer.learn(stream[1])
