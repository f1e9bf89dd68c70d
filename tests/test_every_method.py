"""What is true of every method of the package; a new one needs to be registered only to be tested here."""

import inspect
import re
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_trainer, outcome, pattern_dataset
from hub_server import check_card
from test_export import two_layers

from hf_clpeft import (
    METHODS,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    TaskStream,
    TrainerCallback,
)
from hf_clpeft.config import ContinualConfig
from hf_clpeft.streams.images import open_image


pytestmark = pytest.mark.usefixtures("shallow")
PACKAGE = {name: kind for name, kind in METHODS.items() if kind.__module__.startswith("hf_clpeft.")}
# What has the option `peft`, or any router, is the general form of a method with a name of its own.
NAMES = [name for name, kind in PACKAGE.items() if "peft" not in {f.name for f in fields(kind.Config)}]
NAMES.remove("closed_form")
FLOORS = ("sequential_lora", "linear_probe")  # which forget, and are there to show how much
SMALL = {"k": 2, "projection_size": 40, "kernel_features": 40, "rank": 20, "pool_size": 4, "top_n": 2, "mix": 2}
ARGS = {"num_train_epochs": 3, "train_batch_size": 4, "learning_rate": 1e-2, "head_learning_rate": 1e-2}


def options_of(name):
    """Small ones of a method, for a backbone of two layers."""
    options = PACKAGE[name].Config(**{f.name: SMALL[f.name] for f in fields(PACKAGE[name].Config) if f.name in SMALL})
    if getattr(options, "query_layers", None):
        options.query_layers = options.query_layers[-2:]
    return options


def trainer_on(tiny, name, folder, **training):
    """A trainer of a method, or of its options, on a backbone of two layers."""
    options = options_of(name) if isinstance(name, str) else name
    model = ContinualModel(tiny, ContinualConfig(options, tiny.config))
    args = ContinualTrainingArguments(str(folder), **{**ARGS, "num_train_epochs": 1, "disable_tqdm": True, **training})
    return ContinualTrainer(model, args)


def taught_on_two_layers(name, backbone, folder, **training):
    """A model of two tasks on a ViT of two layers, of which graphs are made in seconds."""
    trainer = trainer_on(two_layers(backbone), name, folder, **training)
    trainer.learn_stream(TaskStream.class_incremental(pattern_dataset(4, per_class=4), num_tasks=2))
    return trainer.model


class Interrupt(TrainerCallback):
    """Raises an error after the third step of a task, or, where it makes none, after the task was learnt."""

    def __init__(self, task, error):
        self.task, self.error, self.steps = task, error, 0

    def on_step_end(self, model, step, num_steps):
        if model.method.task.name == self.task:
            self.steps += 1
            if step == 3:
                raise self.error

    def on_task_end(self, model, task):
        if task.name == self.task:
            raise self.error


class Count(TrainerCallback):
    """Counts the optimizer steps of a task."""

    def __init__(self, task):
        self.task, self.steps = task, 0

    def on_step_end(self, model, step, num_steps):
        self.steps += model.method.task.name == self.task


@pytest.fixture(scope="module")
def stream():
    """Three tasks of two classes."""
    return TaskStream.class_incremental(pattern_dataset(6, per_class=6), num_tasks=3)


@pytest.fixture(scope="module")
def domains():
    """The same three classes in two domains."""
    kinds = ["plain", "negative"]
    return TaskStream.domain_incremental(pattern_dataset(3, per_class=6, domains=kinds), domains=kinds)


@pytest.fixture(scope="module", params=NAMES)
def learnt(request, stream, tmp_path_factory):
    """An undisturbed run: where the model was after one, two and three tasks, and itself. Not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_trainer(options_of(request.param), folder / "3", **ARGS)
    for count in (1, 2, 3):
        report = trainer.learn_stream(stream[:count])
        if count < 3:
            shutil.copytree(folder / "3", folder / str(count))
    return SimpleNamespace(name=request.param, folder=folder, model=trainer.model, report=report)


@torch.no_grad()
def logits(model):
    return model(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits


def state(model):
    """All that a model has learnt, by name, the tensors of its experts as they would be saved."""
    kept = model.method.state_dict().items()  # whose bank has room for more experts than there are
    own = {name: tensor.detach().clone() for name, tensor in kept if not name.startswith("bank.")}
    return own | {(e.name, name): tensor.clone() for e in model.bank for name, tensor in e.tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_tasks_one_after_another_and_has_a_card(learnt):
    matrix, summary = np.array(learnt.report.accuracy_matrix), learnt.report.summary()
    assert np.diag(matrix).mean() > 0.6 and not np.isnan([*matrix[np.tril_indices(3)], *summary.values()]).any()
    assert learnt.name in FLOORS or summary["average_accuracy"] > 0.5
    assert learnt.report.stored_bytes[0] > 0
    kind, card = PACKAGE[learnt.name], (learnt.folder / "3" / "README.md").read_text()
    assert check_card(card) == ([], []) and f"**{kind.title}**" in card
    assert kind.paper is None or f"https://arxiv.org/abs/{kind.paper}" in card
    assert all(f"**{word}**" in card for word in ("Trains", "Stores", "Costs"))


@pytest.mark.parametrize("name", PACKAGE)
def test_it_says_what_it_trains_stores_and_costs(name):
    said = inspect.getdoc(PACKAGE[name].Config)
    for word in ("Trains", "Stores", "Costs"):
        assert re.search(rf"\*\*{word}\*\*\s\S", said), word
    assert PACKAGE[name].title and re.fullmatch(r"\d{4}\.\d{5}|None", str(PACKAGE[name].paper))


def test_neither_batch_size_nor_order_nor_other_tasks_change_a_prediction(learnt, stream):
    images = [[open_image(encoded) for encoded, _, _ in task.test] for task in stream]
    by_task = [learnt.model.predict(several, batch_size=64) for several in images]
    apart = [found for several in zip(*by_task, strict=True) for found in several]
    mixed = [image for several in zip(*images, strict=True) for image in several]
    together, alone = learnt.model.predict(mixed, batch_size=64), learnt.model.predict(mixed[::-1], batch_size=1)[::-1]
    for others in (alone, apart):
        assert [(found.label, found.expert) for found in others] == [(f.label, f.expert) for f in together]
        assert [found.score for found in others] == pytest.approx([found.score for found in together], abs=1e-4)
        assert [found.distance for found in others] == pytest.approx([f.distance for f in together], abs=1e-4)
    labels = [[task.classes[label] for _, label, _ in task.test] for task in stream]
    right = [[f.label == label for f, label in zip(*both, strict=True)] for both in zip(by_task, labels, strict=True)]
    assert np.mean(right, axis=1) == pytest.approx(learnt.report.accuracy_matrix[-1])


def test_it_comes_back_from_disk_and_from_the_hub_to_the_bit(learnt, hub):
    expected, answers = state(learnt.model), logits(learnt.model)
    loaded = ContinualModel.from_pretrained(learnt.folder / "3")
    assert same(state(loaded), expected) and torch.equal(logits(loaded), answers)
    loaded.push_to_hub("alice/model", token="hf_alice")
    pulled = ContinualModel.from_pretrained("alice/model", token="hf_alice", backbone=loaded.backbone)
    assert same(state(pulled), expected) and torch.equal(logits(pulled), answers)


def test_a_run_that_was_interrupted_ends_with_the_same_bits(learnt, stream, tmp_path):
    folder = shutil.copytree(learnt.folder / "1", tmp_path / "run")
    options = {**ARGS, "save_steps": 2, "resume_from_checkpoint": "auto"}
    interrupt, count = Interrupt("task-001", SystemExit()), Count("task-001")
    for callback in (interrupt, count):
        args = make_trainer(options_of(learnt.name), folder, **options).args
        trainer = ContinualTrainer(ContinualModel.from_pretrained(folder), args, callbacks=[callback])
        if callback is count:
            trainer.learn_stream(stream[:2])
        else:
            with pytest.raises(SystemExit):
                trainer.learn_stream(stream[:2])
    assert interrupt.steps in (0, 3) and (interrupt.steps == 0) == (count.steps == 0)
    assert outcome(folder) == outcome(learnt.folder / "2")


def test_an_error_leaves_everything_as_it_was_and_the_task_can_be_learnt_then(learnt, tmp_path):
    extra = TaskStream.class_incremental(pattern_dataset(8, per_class=6), num_tasks=8 if one_class(learnt) else 4)[-1]
    model = ContinualModel.from_pretrained(learnt.folder / "3")
    before, answers, options = state(model), logits(model), model.config.method.to_dict()
    args = make_trainer(options_of(learnt.name), tmp_path / "out", **ARGS).args
    with pytest.raises(ZeroDivisionError):
        ContinualTrainer(model, args, callbacks=[Interrupt(extra.name, ZeroDivisionError())]).learn(extra)
    assert same(state(model), before) and torch.equal(logits(model), answers)
    assert model.config.method.to_dict() == options and len(model.config.tasks) == 3
    assert not any(tensor.requires_grad for tensor in model.method.state_dict(keep_vars=True).values())
    ContinualTrainer(model, args).learn(extra)
    assert logits(model).shape[1] == 6 + len(extra.classes) and logits(model).isfinite().any(dim=1).all()


def one_class(learnt):
    return PACKAGE[learnt.name].takes_one_class


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_the_same_classes_in_another_domain(name, domains, tmp_path):
    trainer = make_trainer(options_of(name), tmp_path, **ARGS)
    report = trainer.learn_stream(domains)
    assert np.diag(report.accuracy_matrix).mean() > 0.5
    loaded = ContinualModel.from_pretrained(tmp_path)
    assert logits(loaded).shape == (6, 3) and torch.equal(logits(loaded), logits(trainer.model))
