"""Routers of users: what one can do is asked of its class, never read from its name."""

import io
import shutil

import pytest
import torch
from conftest import BACKBONE, make_trainer, pattern_dataset, vouch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_clpeft import (
    METHODS,
    ROUTERS,
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    Method,
    TaskStream,
    combine,
    s_lora,
    s_lora_mix,
    slda,
)
from hf_clpeft.methods import Slda, SLora
from hf_clpeft.routing import ClassMeanRouter, GaussianRouter, PrototypeRouter, RidgeRouter


pytestmark = pytest.mark.usefixtures("shallow")


class Cosine(PrototypeRouter):
    title = "nearest prototype, in my own way"

    def __init__(self, query_size):
        super().__init__(query_size)
        self.register_buffer("weight", torch.ones(query_size))

    def distances(self, query):
        return super().distances(query * self.weight)


class Wide(GaussianRouter):
    title = "wide Gaussians"

    def scores(self, query):
        return super().scores(query) / 2


class Means(ClassMeanRouter):
    gives_likelihoods = True  # or so says its author


class Projected(RidgeRouter):
    pass


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    for name, kind in {"cosine": Cosine, "wide": Wide, "means": Means, "projected": Projected}.items():
        monkeypatch.setitem(ROUTERS, name, kind)


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(), num_tasks=2)


def pictures(stream):
    return [Image.open(io.BytesIO(task.test.dataset[0]["image"]["bytes"])) for task in stream]


@pytest.mark.parametrize(
    "method, kind",
    [
        (s_lora(k=2, router="cosine"), Cosine),
        (s_lora(router="wide"), Wide),
        (s_lora_mix(mix=2, router="wide"), Wide),
        (s_lora_mix(mix=2, router="means"), Means),
        (METHODS["closed_form"].Config(router="projected", projection_size=50), Projected),
    ],
    ids=["prototypes", "gaussian", "mix", "mix of means", "no experts"],
)
def test_a_router_of_ones_own_learns_saves_loads_and_answers(method, kind, stream, tmp_path):
    make_trainer(method, tmp_path, num_train_epochs=1).learn_stream(stream)
    model = ContinualModel.from_pretrained(tmp_path)
    assert type(model.router) is kind and model.router.num_owners == 2
    assert [len(found.label) > 0 for found in model.predict(pictures(stream))] == [True, True]
    card = (tmp_path / "README.md").read_text()
    assert kind.title in card and ("reject_rate" in card) == (kind in (Cosine, Wide))
    assert model.can_reject == (kind in (Cosine, Wide))
    if kind is not Cosine:
        if kind is not Wide:
            with pytest.raises(ConfigError, match="reject_rate needs a router that keeps tasks apart"):
                model.predict(pictures(stream), reject_rate=0.5)
        if kind is Projected or method.name == "s_lora_mix":
            with pytest.raises(ConfigError, match="cannot be removed exactly"):
                model.remove("task-000")
        else:
            model.remove("task-000")
            assert model.router.num_owners == 1
        return
    assert len(model.predict(pictures(stream), reject_rate=0.5)) == 2
    both = combine([tmp_path, shutil.copytree(tmp_path, tmp_path.with_name("copy"))])
    assert type(both.router) is Cosine and both.router.num_owners == 4
    model.remove("task-000")
    assert model.router.num_owners == 1
    # what it keeps besides is checked, too
    save_file(load_file(tmp_path / "router.safetensors") | {"weight": torch.ones(3)}, tmp_path / "router.safetensors")
    vouch(tmp_path)
    with pytest.raises(ConfigError, match=r"router.safetensors does not fit the model: weight has shape \(3,\)"):
        ContinualModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "make, router, message",
    [
        (s_lora_mix, "class_means", "scores of 'class_means' are none: choose router='g"),
        (s_lora_mix, "cosine", "scores of 'cosine' are none"),
        (s_lora_mix, "prototypes", "scores of 'prototypes' are none"),
        (METHODS["closed_form"].Config, "cosine", "'cosine' knows tasks alone"),
        (METHODS["closed_form"].Config, "prototypes", "'prototypes' knows tasks alone"),
        (s_lora, "no class", "must be a subclass of ClassRouter or PrototypeRouter"),
        (s_lora, "unheard of", "There is no router 'unheard of'"),
    ],
)
def test_a_router_that_cannot_do_what_is_asked_of_it_is_refused_before_training(make, router, message, monkeypatch):
    monkeypatch.setitem(ROUTERS, "no class", print)
    with pytest.raises(ConfigError, match=message):
        ContinualModel.from_backbone(BACKBONE, make(router=router))


@pytest.mark.parametrize(
    "method", [s_lora(k=2), s_lora(router="gaussian"), slda()], ids=["s_lora", "gaussian", "slda"]
)
def test_a_loop_of_ones_own_learns_and_saves(method, stream, tmp_path):
    trainer = make_trainer(method, "trained", num_train_epochs=1)
    trainer.learn(stream[0])
    for model in (
        ContinualModel.from_backbone(BACKBONE, method),
        ContinualModel.from_pretrained("trained"),
    ):
        query, numbers = torch.randn(8, model.method.query_size), torch.arange(8) % 2 + len(model.config.classes)
        model.start_task("mine", ["p", "q"])
        model.finish_task(lambda _, query=query, numbers=numbers: (query, numbers), num_train_images=8)
        model.save_pretrained(tmp_path / "mine")
        again = ContinualModel.from_pretrained(tmp_path / "mine")
        assert again.config.classes[-2:] == ["p", "q"] and again.router.num_owners == len(again.config.tasks)
        assert len(again.predict(pictures(stream))) == 2
        shutil.rmtree(tmp_path / "mine")
    if again.method.independent:  # and a trainer goes on from there
        report = ContinualTrainer(again, trainer.args).learn(stream[1])
        assert report.tasks == ["task-000", "mine", "task-001"]
        assert ContinualModel.from_pretrained("trained").report.tasks == report.tasks


@pytest.mark.parametrize("base, router", [(SLora, "prototypes"), (Method, "prototypes"), (Slda, "gaussian")])
def test_a_method_that_forgets_to_teach_its_router_is_refused_before_saving(base, router, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "forgetful", None)  # for a while

    class Forgetful(base, name="forgetful"):
        def __init__(self, backbone, config):
            super().__init__(backbone, config)
            self.router = self.router or ROUTERS[router](self.query_size)

        def end(self, features_of):
            if self.heads is not None:
                self.bank.finish(self.task.name)
                self.heads.write(self._head.weight, self._head.bias, self.numbers)

    model = ContinualModel.from_backbone(BACKBONE, Forgetful.Config())
    model.start_task("mine", ["p", "q"])
    model.finish_task(lambda features: pytest.fail("asked for"), num_train_images=8)
    with pytest.raises(ConfigError, match="has learnt 0 of 1 tasks, not mine. The method's `end` must call `self.rou"):
        model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "config.json").exists()


def test_a_class_that_the_router_has_not_seen_is_named_before_saving(tmp_path):
    model = ContinualModel.from_backbone(BACKBONE, s_lora(router="gaussian"))
    features = torch.randn(8, model.method.query_size), torch.zeros(8, dtype=torch.int64)
    model.start_task("mine", ["p", "q"])
    model.finish_task(lambda _: features, num_train_images=8)
    with pytest.raises(ConfigError, match=r"The router knows no image of 1 of the classes, \['q'\]"):
        model.save_pretrained(tmp_path)


def test_the_same_stream_goes_on_without_a_task_that_was_unlearnt(tmp_path, caplog):
    stream = TaskStream.class_incremental(pattern_dataset(num_classes=6), num_tasks=3)
    trainer = make_trainer(s_lora(k=2, head="per_task"), tmp_path, num_train_epochs=1)
    for task in stream[:2]:
        trainer.learn(task)
    model = ContinualModel.from_pretrained(tmp_path)
    model.remove("task-000")
    model.save_pretrained(tmp_path)
    report = ContinualTrainer(ContinualModel.from_pretrained(tmp_path), trainer.args).learn_stream(stream)
    assert report.tasks == ["task-001", "task-002"] and "task-000 was unlearnt and stays so" in caplog.text
    assert len(report.accuracy_matrix) == 2 and not any(value != value for value in report.accuracy_matrix[-1])
    assert ContinualModel.from_pretrained(tmp_path).config.classes == [f"class {i}" for i in range(2, 6)]
