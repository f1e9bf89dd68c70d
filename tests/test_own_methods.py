"""A method of a user's own has all that those of the package have, and nothing is believed that its file may hold."""

import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, outcome, pattern_dataset, vouch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter, ParameterList
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualConfig,
    ContinualModel,
    ContinualTrainer,
    ExpertError,
    Method,
    MethodOptions,
    TaskStream,
    TrainerCallback,
)
from hf_clpeft.cli import app
from hf_clpeft.config.method import OPTIONS
from hf_clpeft.hub.push import PushTarget, push_folder
from hf_clpeft.methods.state import load_state
from hf_clpeft.reports.card import make_card
from hf_clpeft.streams.images import open_image


class Layers(Method, name="layers"):
    """A residual layer more with each task on top of the backbone; all of them and the head are trained in place."""

    title, paper, reads, fixed_query = "Growing layers", "2207.12819", False, True

    @dataclass
    class Config(MethodOptions):
        width: int = field(default=4, metadata={"help": "Width of each residual layer."})
        per_image: bool = field(default=True, metadata={"help": "Give a loss for each image, or their mean."})

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.layers = ParameterList()
        self.head = Parameter(torch.zeros(0, self.query_size))
        self.register_buffer("seen", torch.zeros(0, dtype=torch.int64))  # images of each class in all steps

    def begin(self, task):
        self.layers.append(Parameter(0.1 * torch.randn(self.query_size, self.options.width)))
        new = len(self.classes) - len(self.head)
        self.head = Parameter(torch.cat([self.head, torch.zeros(new, self.query_size)]))
        self.seen = torch.cat([self.seen, torch.zeros(new, dtype=torch.int64)])
        self.layers.requires_grad_()

    def loss(self, batch):
        self.seen += batch.labels.bincount(minlength=len(self.seen))
        logits = self.classify(self.query(batch.pixels), None)
        return cross_entropy(logits, batch.labels, reduction="none" if self.options.per_image else "mean")

    def classify(self, features, routing):
        for layer in self.layers:
            features = features + torch.relu(features @ layer) @ layer.T
        return features @ self.head.T

    def check(self):
        layers = [(self.query_size, self.options.width)] * len(self.config.tasks)
        if [layer.shape for layer in self.layers] != layers or len(self.head) != len(self.config.classes):
            raise ConfigError("method.safetensors has layers or head rows of other tasks.")

    @classmethod
    def facts(cls, options):
        return {"experts": "none", "layers": f"one of width {options.width} with each task"}


class At(TrainerCallback):
    """Does something after an optimizer step of a task."""

    def __init__(self, act, task="task-001", step=3):
        self.act, self.task, self.step = act, task, step

    def on_step_end(self, model, step, num_steps):
        if (model.method.task.name, step) == (self.task, self.step):
            self.act(model)


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6, per_class=8), num_tasks=3)


@pytest.fixture(scope="module")
def folder(stream, tmp_path_factory):
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("layers")
    make_trainer(Layers.Config(), folder).learn_stream(stream)
    return folder


@pytest.fixture
def saved(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


@torch.no_grad()
def logits(model):
    return model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.method.state().items()}


def in_thread(act):
    """What a function gives, or the error it raises, in another thread."""
    found = []

    def run():
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_it_learns_and_comes_back_from_disk_and_from_the_hub_to_the_bit(hub, stream):
    trainer = make_trainer(Layers.Config(width=3), num_train_epochs=8)
    report = trainer.learn_stream(stream[:2])
    assert report.accuracy_matrix[0][0] > 0.9
    loaded = ContinualModel.from_pretrained("out")
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert {name: tuple(tensor.shape) for name, tensor in load_file("out/method.safetensors").items()} == {
        "layers.0": (128, 3),
        "layers.1": (128, 3),
        "head": (4, 128),
        "seen": (4,),
    }
    assert loaded.method.seen.tolist() == [8 * 8] * 4  # images times epochs
    loaded.push_to_hub("alice/layers", token="hf_alice")
    assert torch.equal(logits(ContinualModel.from_pretrained("alice/layers", token="hf_alice")), logits(loaded))
    # What is on disk goes on as what is in memory.
    options = {"num_train_epochs": 2, "train_batch_size": 8}
    more = make_trainer(Layers.Config(width=3), "more", **options).args
    for name, model in (("memory", trainer.model), ("disk", loaded)):
        ContinualTrainer(model, more).learn(stream[2])
        shutil.move("more", name)
    assert outcome("memory")[0] == outcome("disk")[0]


def test_a_mean_loss_trains_as_a_loss_for_each_image(folder, stream):
    make_trainer(Layers.Config(per_image=False)).learn_stream(stream)
    expected = load_file(folder / "method.safetensors")
    for name, tensor in load_file("out/method.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)


def test_options_are_saved_and_facts_stand_in_the_card(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == {"name": "layers", "width": 4, "per_image": True}
    assert "one of width 4 with each task" in (folder / "README.md").read_text()


def test_neither_batch_size_nor_order_changes_a_prediction(folder, stream):
    model = ContinualModel.from_pretrained(folder)
    images = [open_image(encoded) for task in stream for encoded, _, _ in task.test]
    together, alone = model.predict(images, batch_size=64), model.predict(images[::-1], batch_size=1)[::-1]
    assert [found.label for found in together] == [found.label for found in alone]
    assert [found.score for found in together] == pytest.approx([found.score for found in alone], abs=1e-4)


def test_a_run_that_was_interrupted_ends_with_the_same_bits(folder, stream):
    def kill(model):
        raise SystemExit

    for task in ("task-000", "task-001"):
        options = {"save_steps": 2, "resume_from_checkpoint": "auto"}
        new = make_trainer(Layers.Config(), task, **options)
        with pytest.raises(SystemExit):
            ContinualTrainer(new.model, new.args, callbacks=[At(kill, task)]).learn_stream(stream)
        again, steps = make_trainer(Layers.Config(), task, **options), []
        model = again.model if task == "task-000" else ContinualModel.from_pretrained(task)
        noted = [At(steps.append, task, step) for step in (1, 2, 3)]
        ContinualTrainer(model, again.args, callbacks=noted).learn_stream(stream)
        assert len(steps) == 1  # it went on after step 2
        assert outcome(task) == outcome(folder)


def test_an_error_in_the_middle_of_training_leaves_everything_as_it_was(saved, stream):
    model = ContinualModel.from_pretrained(saved)
    before, answers = state(model), logits(model)

    def fail(model):
        assert state(model).keys() > before.keys() and not torch.equal(model.method.layers[0], before["layers.0"])
        raise ZeroDivisionError

    more = TaskStream.class_incremental(pattern_dataset(8, per_class=8), num_tasks=4)[3]
    args = make_trainer(Layers.Config(), "out").args
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ContinualTrainer(model, args, callbacks=[At(fail, more.name)]).learn(more)
        after = state(model)
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert not any(tensor.requires_grad for tensor in model.method.state().values())
        assert torch.equal(in_thread(lambda: logits(model)), answers)
    ContinualTrainer(model, args).learn(more)
    assert len(ContinualModel.from_pretrained("out").config.tasks) == 4


def test_other_threads_are_refused_while_it_is_trained_in_place(stream):
    found = []

    def look(model):
        for act in (lambda: logits(model), lambda: model.save_pretrained("elsewhere")):
            found.append(in_thread(act))
        assert len(logits(model)) == 8  # its own thread may

    trainer = make_trainer(Layers.Config())
    ContinualTrainer(trainer.model, trainer.args, callbacks=[At(look)]).learn_stream(stream[:2])
    assert [type(error) for error in found] == [ExpertError] * 2
    assert "Another thread is training task-001 in this model, and layers changes what it predicts with" in str(
        found[0]
    )
    assert torch.equal(in_thread(lambda: logits(trainer.model)), logits(trainer.model))


@pytest.mark.parametrize("size", [0, 1])
def test_a_list_of_any_length_comes_back_from_disk_in_its_order(tmp_path, size):
    module = torch.nn.ModuleDict({"parts": ParameterList(torch.full((size, i), float(i)) for i in range(12))})
    save_file(dict(module.state_dict()), tmp_path / "items.safetensors")
    loaded = torch.nn.ModuleDict({"parts": ParameterList()})
    load_state(loaded, load_file(tmp_path / "items.safetensors"), loaded.state_dict())
    assert [item.shape for item in loaded["parts"]] == [item.shape for item in module["parts"]]
    assert all(torch.equal(item, other) for item, other in zip(loaded["parts"], module["parts"], strict=True))


HOSTILE = {
    "extra": (lambda t: t.update(more=torch.zeros(1)), "has ['more'] too many"),
    "missing": (lambda t: t.pop("head"), "lacks ['head']"),
    "none": (lambda t: t.clear(), "lacks ['head', 'seen']"),
    "shape": (lambda t: t.update(head=torch.zeros(6, 127)), "head has shape (6, 127), not (0, 128)"),
    "dimensions": (lambda t: t.update(head=torch.zeros(6)), "head has shape (6,)"),
    "rows": (lambda t: t.update(head=torch.zeros(5, 128)), "head rows of other tasks"),
    "half": (lambda t: t.update(head=t["head"].half()), "torch.float16 in head"),
    "double": (lambda t: t.update({"layers.1": t["layers.1"].double()}), "torch.float64 in layers.1"),
    "integers": (lambda t: t.update(head=t["head"].long()), "head is of torch.int64"),
    "floats": (lambda t: t.update(seen=t["seen"].float()), "seen is of torch.float32"),
    "integers in a list": (lambda t: t.update({"layers.1": t["layers.1"].long()}), "layers.1 is of torch.int64"),
    "nan": (lambda t: t["layers.0"].fill_(torch.nan), "not finite in layers.0"),
    "infinite": (lambda t: t["head"].fill_(torch.inf), "not finite in head"),
    "a gap": (lambda t: t.pop("layers.1"), "the items of layers are ['layers.0', 'layers.2']"),
    "no number": (lambda t: t.update({"layers.x": t["layers.1"].clone()}), "the items of layers are"),
    "too few": (lambda t: t.pop("layers.2"), "has layers"),
    "elsewhere": (lambda t: t.update({"bank.x": t["head"].clone()}), "has ['bank.x'] too many"),
}


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_does_not_fit_is_refused_by_name_and_tensor(saved, backbone, change, message):
    path = saved / "method.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="method.safetensors is not the file that config.json vouches for"):
        ContinualModel.from_pretrained(saved, backbone=backbone)
    vouch(saved)
    with pytest.raises(ConfigError) as refused:
        ContinualModel.from_pretrained(saved, backbone=backbone)
    assert "method.safetensors" in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_file_that_is_cut_missing_or_unasked_for_is_refused(saved, backbone, learnt):
    path = saved / "method.safetensors"
    content = path.read_bytes()
    for damage, message in ((content[:40], "damaged"), (b"", "damaged"), (None, "lacks the file method.safetensors")):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
            vouch(saved)
        with pytest.raises(ConfigError, match=f"{message}|method.safetensors is damaged"):
            ContinualModel.from_pretrained(saved, backbone=backbone)
        path.write_bytes(content)
        vouch(saved)
    other = Path(shutil.copytree(learnt.args.output_dir, "other"))
    shutil.copy(path, other)
    with pytest.raises(ConfigError, match=r"holds method.safetensors, which its config.json does not know"):
        ContinualModel.from_pretrained(other, backbone=backbone)
    config = json.loads((other / "config.json").read_text())
    config["files"]["method.safetensors"] = ""
    (other / "config.json").write_text(json.dumps(config))
    vouch(other)
    with pytest.raises(ConfigError, match=r"method.safetensors does not fit the model: .*too many"):
        ContinualModel.from_pretrained(other, backbone=backbone)


@pytest.mark.parametrize(
    "method, message",
    [
        ({"name": "layers", "depth": 3}, "method layers has no option 'depth'"),
        ({"name": "layers", "width": "wide"}, "width='wide' must be int"),
        ({"name": "layers", "width": True}, "width=True must be int"),
        ({"name": "layers", "per_image": None}, "per_image=None must be bool"),
        ({"name": "layers", "width": 5}, "method.safetensors"),
        ({"name": ["layers"]}, "method is no mapping with the name of a method"),
        ({"width": 4}, "method is no mapping with the name of a method"),
        ("layers", "method is no mapping with the name of a method"),
        (None, "method is no mapping with the name of a method"),
        ({"name": "nobody knows", "x": 1}, "There is no method 'nobody knows'.*import the file that defines it first"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(saved, backbone, method, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "method": method}))
    with pytest.raises(ConfigError, match=message):
        ContinualModel.from_pretrained(saved, backbone=backbone)


def test_a_model_whose_method_is_not_at_hand_is_shown_and_pushed_but_not_loaded(hub, saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delitem(METHODS, "layers")
        patch.delitem(OPTIONS, "layers")
        with pytest.raises(ConfigError, match="There is no method 'layers'.*import the file that defines it first"):
            ContinualModel.from_pretrained(saved)
        shown = json.loads(CliRunner().invoke(app, ["info", str(saved), "--json"], catch_exceptions=False).stdout)
        assert shown["method"] == "layers" and len(shown["tasks"]) == 3
        push_folder(saved, PushTarget("alice/layers", token="hf_alice"))
    pulled = ContinualModel.from_pretrained("alice/layers", token="hf_alice")
    assert torch.equal(logits(pulled), logits(ContinualModel.from_pretrained(saved)))
    assert "layers" in hub.repo("alice/layers").files()["README.md"].decode()


def test_a_method_that_implements_the_least_says_what_it_cannot_do_and_has_a_card(backbone, monkeypatch):
    for registry in (METHODS, OPTIONS):
        monkeypatch.setitem(registry, "least", None)  # which takes it out again at the end

    class Least(Method, name="least"):
        independent = True

        @dataclass
        class Config(MethodOptions):
            peft: str = "a name of its own"

    config = ContinualConfig(Least.Config(), backbone.config)
    assert "| options | peft = a name of its own |" in str(make_card(config))
    method = METHODS["least"](backbone, config)
    with pytest.raises(ConfigError, match="least does not implement `remove`, so no task can be unlearnt"):
        method.remove(0, {})
    with pytest.raises(ConfigError, match="which does not implement `alike` and `merge`"):
        method.alike()
