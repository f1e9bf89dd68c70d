"""Tasks that are trained together, in one pass over mixed batches, are learnt as each would be alone."""

import json

import numpy as np
import pytest
import torch
from conftest import OnStep, make_trainer, pattern_dataset

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    ExpertBank,
    ExpertError,
    Method,
    TaskStream,
    ease,
    l2l,
    s_lora,
    s_lora_mix,
    s_prompts,
    s_x,
    sequential_lora,
)
from hf_clpeft.experts import together as experts_together


pytestmark = pytest.mark.usefixtures("shallow")
OPTIONS = {"augmentation": "crop_flip", "train_batch_size": 5}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}


@pytest.fixture(scope="module")
def stream():
    """Three tasks, of which the second has more images, and so more steps."""
    data = pattern_dataset(num_classes=6, per_class=8)
    labels = np.array(data["train"]["label"])
    kept = [i for i in range(len(labels)) if labels[i] in (2, 3) or i % 8 < 6]
    data["train"] = data["train"].select(kept)
    return TaskStream.class_incremental(data, num_tasks=3)


def weights(folder):
    """Everything that a model has learnt, by name."""
    model = ContinualModel.from_pretrained(folder)
    kept = {f"{expert.name} {key}": tensor for expert in model.bank for key, tensor in expert.tensors.items()}
    return kept | {name: tensor for name, tensor in model.method.state_dict().items() if "bank" not in name}


def check_same(found, wanted, tolerance=1e-4):
    found, wanted = weights(found), weights(wanted)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=tolerance, msg=name)


@pytest.fixture
def passes(monkeypatch):
    """The number of experts in every pass of several of them."""
    seen, run = [], experts_together.SlotsTogether.__call__

    def counted(slots, stages, pixels):
        seen.append(len(stages))
        return run(slots, stages, pixels)

    monkeypatch.setattr(experts_together.SlotsTogether, "__call__", counted)
    return seen


@pytest.mark.parametrize(
    "method, options",
    [
        (s_lora(r=2, k=2), {}),
        (s_prompts(prompt_length=2, k=2), {"gradient_accumulation_steps": 2}),
        (s_x(peft=PREFIX, k=2), {"gradient_checkpointing": True}),
        (s_lora_mix(r=1, expert_layers=[-2, -1]), {"augmentation_views": 2}),
        (ease(r=1), {"optim": "sgd", "weight_decay": 0.1}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_task_is_learnt_as_it_is_alone(method, options, stream, passes, tmp_path):
    options = {**OPTIONS, **options}
    make_trainer(method, tmp_path / "alone", **options).learn_stream(stream)
    report = make_trainer(method, tmp_path / "together", **options).learn_stream(stream, together=2)
    check_same(tmp_path / "together", tmp_path / "alone")
    assert set(passes) == {2}  # and the last one, which has no company, trains as always
    assert all(parts["train"] > 0 for parts in report.seconds)
    assert not (tmp_path / "together" / ".parallel").exists()


def test_an_expert_gets_no_gradient_from_images_of_others(backbone):
    from hf_clpeft.experts.expert import make_peft_config

    bank, stages, pixels = ExpertBank(backbone), [], torch.randn(5, 3, 32, 32)
    for name in ("one", "two"):
        bank.start(name, make_peft_config({"peft_type": "LORA", "r": 2, "init_lora_weights": False}, backbone))
        stages.append(bank.slot)
    one, two = experts_together.SlotsTogether(bank, stages[0])(stages, [pixels[:2], pixels[2:]])
    torch.testing.assert_close(one, stages[0](pixels[:2]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two, stages[1](pixels[2:]), atol=1e-5, rtol=1e-4)
    two.sum().backward()
    grads = [torch.cat([p.grad.flatten() for p in stage.parameters() if p.requires_grad]) for stage in stages]
    assert not grads[0].any() and grads[1].any()


def test_a_killed_run_trains_no_expert_twice_and_goes_on_inside_the_others(stream, tmp_path):
    make_trainer(s_lora(k=2), tmp_path / "whole", **OPTIONS).learn_stream(stream)
    options = {**OPTIONS, "together": 2, "resume_from_checkpoint": "auto", "save_steps": 2}
    steps, again = [], []

    def die(done, total):
        steps.append(done)
        if len(steps) == 15:  # the first task has ended, and the third has begun
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(s_lora(k=2), tmp_path / "killed", **options, callbacks=[OnStep(die)]).learn_stream(stream)
    assert (tmp_path / "killed" / ".parallel" / "task-000" / "run.json").is_file()
    trainer = make_trainer(
        s_lora(k=2), tmp_path / "killed", **options, callbacks=[OnStep(lambda done, total: again.append(done))]
    )
    trainer.learn_stream(stream)
    all_steps = 2 * sum(-(-len(task.train.dataset) // 5) for task in stream)
    assert all_steps - 15 <= len(again) <= all_steps - 15 + 2 * 2
    check_same(tmp_path / "killed", tmp_path / "whole")


def test_a_run_that_is_asked_to_stop_saves_every_task(stream, tmp_path):
    from hf_clpeft.training.steps import TrainingStopped

    options, count = {**OPTIONS, "together": 3, "resume_from_checkpoint": "auto", "save_steps": 0}, []
    trainer = make_trainer(s_lora(k=2), tmp_path / "stopped", **options)

    def stop(done, total):
        count.append(done)
        if len(count) == 4:  # in the second step of the first task
            trainer.stop.set()

    trainer.callbacks.callbacks.append(OnStep(stop))
    with pytest.raises(TrainingStopped):
        trainer.learn_stream(stream)
    states = sorted((tmp_path / "stopped" / ".parallel").glob(".task-*/checkpoints/*/state.json"))
    assert [json.loads(path.read_text())["progress"]["step"] for path in states] == [2, 2, 2]
    anew = make_trainer(s_lora(k=2), tmp_path / "stopped", **OPTIONS)
    with pytest.raises(ConfigError, match=r"interrupted run \(\.parallel/\.task-000/checkpoints/task-000-00000002\)"):
        anew.learn_stream(stream)
    make_trainer(s_lora(k=2), tmp_path / "stopped", **options).learn_stream(stream)
    make_trainer(s_lora(k=2), tmp_path / "whole", **OPTIONS).learn_stream(stream)
    check_same(tmp_path / "stopped", tmp_path / "whole")


def test_batches_that_do_not_fit_into_memory_are_cut(stream, tmp_path, monkeypatch):
    run = experts_together.SlotsTogether.__call__

    def too_large(slots, stages, pixels):
        if sum(map(len, pixels)) > 6:
            raise torch.OutOfMemoryError("too large")
        return run(slots, stages, pixels)

    make_trainer(s_lora(k=2), tmp_path / "whole", **OPTIONS).learn_stream(stream)
    monkeypatch.setattr(experts_together.SlotsTogether, "__call__", too_large)
    make_trainer(s_lora(k=2), tmp_path / "cut", **OPTIONS).learn_stream(stream, together=2)
    check_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "method, error, message",
    [
        (l2l(), ConfigError, "together needs an expert per task and masked logits; l2l has not"),
        (sequential_lora(), ConfigError, "together needs an expert per task"),
        (METHODS["mos"].Config(), ConfigError, "together needs experts that are trained apart; those of mos"),
        (
            s_x(peft={"peft_type": "LOHA", "r": 2}),
            ExpertError,
            "LOHA cannot be trained together: that needs",
        ),
        (s_lora(lora={"lora_dropout": 0.1}), ExpertError, "Set lora_dropout=0"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_cannot_be_trained_together_is_refused(method, error, message, stream, tmp_path):
    with pytest.raises(error, match=message):
        make_trainer(method, tmp_path, together=2).learn_stream(stream)
    assert not (tmp_path / "config.json").exists()


class OwnParameters(Method, name="own_parameters"):
    """Trains a layer of its own for each task, and no expert of the bank."""

    independent, reads = True, False

    def begin(self, task):
        self._head = torch.nn.Linear(self.query_size, len(task.classes))

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self._head(self.query(batch.pixels)), self.rows(batch.labels))


def test_a_method_without_experts_is_refused_too(stream, tmp_path):
    with pytest.raises(ConfigError, match="own_parameters trains no PEFT expert"):
        make_trainer(OwnParameters.Config(), tmp_path, together=2).learn_stream(stream)


def test_streams_that_cannot_be_trained_together_are_refused(stream, tmp_path):
    with pytest.raises(ConfigError, match=r"those of task-000 are streamed.*together=1"):
        make_trainer(s_lora(), tmp_path, together=2, cache_size_gb=1e-5).learn_stream(stream)
    with pytest.raises(ConfigError, match="together=0 must be"):
        make_trainer(s_lora(), tmp_path).learn_stream(stream, together=0)
    borderless = TaskStream.from_batches([], lambda images: np.zeros((len(images), 2)))
    with pytest.raises(ConfigError, match="together must know all tasks beforehand"):
        make_trainer(s_lora(), tmp_path).learn_stream(borderless, together=2)
