"""A method may fit what training starts from to the images of a task, before the first step and when it goes on."""

from dataclasses import dataclass

import pytest
import torch
from conftest import OnStep, make_trainer, outcome, pattern_dataset
from torch.nn.functional import cross_entropy

from hf_clpeft import Method, MethodOptions, TaskStream, make_peft_config, s_lora
from hf_clpeft.methods import SLora
from hf_clpeft.training import features
from hf_clpeft.training.features import extract


class Whitened(Method, name="whitened"):
    """LoRA whose features are standardised by those of the task's images before training."""

    independent = takes_one_class = True

    @dataclass
    class Config(MethodOptions):
        dropout: float = 0.0

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.register_buffer("means", torch.zeros(0, backbone.hidden_size))
        self.register_buffer("weights", torch.zeros(0, backbone.hidden_size))
        self.calls = []

    def begin(self, task):
        peft = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": self.options.dropout}
        self.bank.start(task.name, make_peft_config(peft, self.backbone))
        self._head = torch.nn.Linear(self.backbone.hidden_size, len(task.classes), bias=False)
        self._mean = torch.nn.Parameter(torch.zeros(self.backbone.hidden_size))
        self.calls.append("begin")

    def prepare(self, features_of):
        features, labels = features_of(self.bank.under_training)
        assert sorted(labels.unique().tolist()) == sorted(self.numbers) and not features.requires_grad
        self._mean.data = features.mean(dim=0).to(self._mean)
        self.calls.append(len(features))

    def loss(self, batch):
        self.calls.append("loss")
        features = self.bank.under_training(batch.pixels) - self._mean
        return cross_entropy(self._head(features), self.rows(batch.labels))

    def end(self, features_of):
        self.bank.finish(self.task.name)
        self.means = torch.cat([self.means, self._mean.detach()[None]])
        self.weights = torch.cat([self.weights, self._head.weight.detach()])
        del self._mean, self._head

    def classify(self, features, routing):
        return (features - self.means[routing.selection]) @ self.weights.T

    def expert_names(self):
        return [task.name for task in self.config.tasks]

    def expert_of(self, position):
        return position


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)


@pytest.fixture(scope="module")
def folder(stream, tmp_path_factory):
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("whitened")
    make_trainer(Whitened.Config(dropout=0.5), folder).learn_stream(stream)
    return folder


def test_it_comes_after_begin_and_before_the_first_step_and_what_it_sets_is_trained(stream):
    means = []
    method = (trainer := make_trainer(Whitened.Config(), num_train_epochs=1)).model.method
    trainer.callbacks.callbacks.append(OnStep(lambda done, total: means.append(method._mean.detach().clone())))
    trainer.learn(stream[0])
    assert method.calls == ["begin", 12, "loss", "loss"]
    assert not torch.equal(*means)


def test_a_task_with_one_class_is_prepared_too():
    stream = TaskStream.class_incremental(pattern_dataset(2), num_tasks=2)
    trainer = make_trainer(Whitened.Config())
    trainer.learn_stream(stream)
    assert trainer.model.method.calls == ["begin", 6] * 2


def test_a_run_that_is_resumed_inside_a_task_ends_with_the_same_bits(stream, folder, tmp_path):
    def kill(done, total):
        if done == 3:
            raise SystemExit

    options = {"save_steps": 2, "resume_from_checkpoint": "auto"}
    with pytest.raises(SystemExit):
        make_trainer(Whitened.Config(dropout=0.5), tmp_path, [OnStep(kill)], **options).learn_stream(stream)
    trainer = make_trainer(Whitened.Config(dropout=0.5), tmp_path, **options)
    trainer.learn_stream(stream)
    assert trainer.model.method.calls[:3] == ["begin", 12, "loss"]
    assert outcome(tmp_path) == outcome(folder)


def test_experts_trained_side_by_side_are_the_same(stream, folder, tmp_path):
    make_trainer(Whitened.Config(dropout=0.5), tmp_path, task_parallel=True).learn_stream(stream)
    assert outcome(tmp_path) == outcome(folder)


def test_nothing_is_prepared_for_parameters_that_are_copied(stream, tmp_path, monkeypatch):
    def fail(method, features_of):
        raise ZeroDivisionError

    make_trainer(s_lora(), tmp_path / "trained").learn_stream(stream[:1])
    monkeypatch.setattr(SLora, "prepare", fail)
    trainer = make_trainer(s_lora(), tmp_path / "given", experts_from=str(tmp_path / "trained"))
    trainer.learn(stream[0])
    with pytest.raises(ZeroDivisionError):
        trainer.learn(stream[1])


def test_a_method_that_prepares_nothing_runs_no_forward_pass_more(stream, monkeypatch):
    trainer, calls = make_trainer(s_lora()), []
    monkeypatch.setattr(features, "extract", lambda *args: calls.append(args[6]) or extract(*args))
    trainer.learn(stream[0])
    assert calls == ["Querying task-000"] * 2  # training and test images
