"""Experts in upper layers: what they compute, what passes share with them, and what is cached."""

import csv
import runpy
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, outcome, pattern_dataset, shallowing
from peft import PeftModel
from test_every_method import ARGS, NAMES, PACKAGE, options_of
from transformers import AutoModel

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    ContinualTrainingArguments,
    HfClpeftError,
    TaskStream,
    TrainerCallback,
    dualprompt,
    s_lora,
    s_lora_mix,
    s_x,
    tuna,
)
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.backbones.trunk import Hidden, Trunk
from hf_clpeft.experts.bank import ExpertBank
from hf_clpeft.streams import cache_images
from hf_clpeft.training.evaluation import Evaluator
from hf_clpeft.training.lesson import Lesson
from hf_clpeft.training.trunk_cache import TrunkCaches


IA3 = {"peft_type": "IA3", "target_modules": ["v_proj", "fc2"], "feedforward_modules": ["fc2"]}
UPPER = [name for name in NAMES if "expert_layers" in {f.name for f in fields(PACKAGE[name].Config)}]


def upper(name, layers=(-2, -1)):
    options = options_of(name)
    options.expert_layers = list(layers)
    return options


@pytest.fixture(scope="module")
def stream():
    """Two tasks of two classes."""
    return TaskStream.class_incremental(pattern_dataset(4, per_class=6), num_tasks=2)


class Losses(TrainerCallback):
    """Collects what is logged in training."""

    def __init__(self):
        self.logged = []

    def on_log(self, model, values, step):
        self.logged += [values] if "train/loss" in values else []


def watch(model):
    """A list that gets the number of images that run through a layer, whenever one runs."""
    counts = []
    for layer in model.backbone.model.layers:
        layer.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize("layers", [None, 1, 4, 6, [1, 2], [2, 4], [3, 4, 5], [5, 6], [2, 6]])
def test_a_pass_that_goes_on_gives_the_same_bits(backbone, layers):
    pixels, trunk = torch.randn(2, 3, 32, 32), Trunk(4)
    with torch.no_grad():
        whole = backbone(pixels, layers)
        assert torch.equal(backbone(pixels, layers, trunk), whole)  # keeps
        assert torch.equal(backbone(pixels, layers, trunk), whole)  # goes on
        assert torch.equal(backbone(pixels, None, trunk), backbone(pixels))  # goes on after any of the trunk's layers
        assert torch.equal(backbone(pixels + 1, layers, trunk), backbone(pixels + 1, layers))  # other images


def test_a_trunk_forgets_images_that_are_gone():
    trunk, kept = Trunk(4), torch.zeros(1)
    trunk.keep(kept, Hidden(4, torch.zeros(1), wrapped=False))
    trunk.keep(torch.zeros(1), Hidden(4, torch.zeros(1), wrapped=False))
    trunk.keep(kept, Hidden(5, torch.zeros(1), wrapped=False))  # above the trunk
    assert len(trunk._kept) == 1 and trunk.find(kept).layers == 4


@pytest.fixture
def three_layers():
    with shallowing(3):
        yield


@pytest.mark.usefixtures("three_layers")
@pytest.mark.parametrize("name", UPPER)
def test_every_method_answers_as_without_sharing(name, stream, tmp_path, monkeypatch):
    trainer = make_trainer(upper(name), tmp_path / "cached", **ARGS)
    trainer.learn_stream(stream)
    model, pixels = trainer.model, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shared = model(pixels)
        assert torch.equal(ContinualModel.from_pretrained(tmp_path / "cached")(pixels).logits, shared.logits)
        monkeypatch.setattr(ExpertBank, "depth", 0)
        assert torch.equal(model(pixels).logits, shared.logits)
    make_trainer(upper(name), tmp_path / "plain", trunk_cache_gb=0, **ARGS).learn_stream(stream)
    (cached, measured), (plain, wanted) = outcome(tmp_path / "cached"), outcome(tmp_path / "plain")
    passes = [one.pop("test_forwards_per_image") for one in (measured, wanted)]
    assert passes[0] <= passes[1]
    assert {**measured, "environment": 0} == {**wanted, "environment": 0} and cached.keys() == plain.keys()
    assert ContinualModel.from_pretrained(tmp_path / "plain")(pixels).logits.allclose(shared.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "layers_run"),
    [
        (s_lora(expert_layers=[-2, -1]), 6 + 2),
        (s_lora(expert_layers=[-2, -1], query_layers=[4]), 4 + 2),  # routed at the trunk
        (s_lora(expert_layers=[-2, -1], query_layers=[2]), 2 + 2 + 2),
        (s_lora_mix(expert_layers=[-2, -1], mix=2), 6 + 2 * 2),
        (s_x(peft={"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, expert_layers=[6]), 6 + 1),
        (dualprompt(expert_layers=[-2, -1]), 6 + 6),  # general prefixes change the layers below
    ],
)
def test_a_prediction_runs_the_trunk_once(options, layers_run, stream, tmp_path):
    trainer = make_trainer(options, tmp_path, num_train_epochs=1)
    trainer.learn_stream(stream)
    counts = watch(trainer.model)
    trainer.model.predict(list(pattern_dataset(4, per_class=1)["train"]["image"])[:4], batch_size=4)
    assert sum(size for size in counts if size > 1) == 4 * layers_run


@pytest.mark.parametrize(
    "options",
    [
        s_lora(),
        s_lora(expert_layers=[-2, -1]),
        s_lora(expert_layers=[-2, -1], query_layers=[4]),
        s_lora(expert_layers=[-2, -1], query_layers=[2]),
        tuna(expert_layers=[-2, -1]),
    ],
)
def test_the_passes_of_a_report_are_those_that_evaluation_has_run(options, stream, tmp_path, monkeypatch):
    trainer = make_trainer(options, tmp_path, num_train_epochs=1)
    counts, seen = watch(trainer.model), []

    def counting(run):
        def counted(*args, **more):
            before = len(counts)
            result = run(*args, **more)
            seen.extend(counts[before:])
            return result

        return counted

    for name in ("add", "evaluate"):
        monkeypatch.setattr(Evaluator, name, counting(getattr(Evaluator, name)))
    report = trainer.learn_stream(stream)
    images = sum(len(task.test.dataset) for task in stream)
    layers = sum(size for size in seen if size > 1)  # others are embeddings of one image
    assert report.test_forwards_per_image == pytest.approx(layers / (6 * images))


def test_a_bank_of_upper_layers_is_one_graph(stream, tmp_path):
    trainer = make_trainer(s_lora(expert_layers=[-2, -1]), tmp_path, num_train_epochs=1, torch_compile=True)
    assert trainer.model.bank._compiled_call_impl is None  # passes start at different layers
    trainer.learn_stream(stream)
    bank, pixels, selection = trainer.model.bank, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad(), bank.sharing():
        wanted = bank(pixels, selection)
        found = torch.compile(bank, backend="eager", fullgraph=True)(pixels, selection)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_experts_that_run_one_after_another_share_it_too(stream, tmp_path, monkeypatch):
    trainer = make_trainer(s_x(peft=IA3, expert_layers=[5, 6]), tmp_path, learning_rate=0.1)
    trainer.learn_stream(stream)
    model, pixels, selection = trainer.model, torch.randn(3, 3, 32, 32), torch.tensor([[0, 1], [1, 0], [1, 1]])
    with torch.no_grad(), model.bank.sharing() as trunk:
        shared = model.bank.each(pixels, selection)
        assert trunk.depth == 4 and trunk.find(pixels) is not None
        monkeypatch.setattr(ExpertBank, "depth", 0)
    with torch.no_grad():
        assert torch.allclose(model.bank.each(pixels, selection), shared, atol=1e-6)


def test_training_runs_the_trunk_once_per_image(stream, tmp_path):
    trainer = make_trainer(s_lora(expert_layers=[-1], query_layers=[5]), tmp_path, num_train_epochs=7)
    counts = watch(trainer.model)
    trainer.learn(stream[0])
    train, test = len(stream[0].train.dataset), len(stream[0].test.dataset)
    assert sum(counts) <= 5 * (train + test) + 7 * train + test + 40  # probes, and embeddings of one image


def test_a_cache_that_is_too_large_is_not_made(backbone, stream, monkeypatch):
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    caches, images = TrunkCaches(model.bank, 1e-4), cache_images(stream[0].train, backbone.transform)
    monkeypatch.setattr(ExpertBank, "depth", 4)
    pixels, index = torch.randn(2, 3, 32, 32), torch.arange(2)
    with caches.recalling(images, pixels, index):
        model.bank.frozen(pixels)
    assert list(caches._caches.values()) == [{0: None}]
    caches.limit, caches._caches = 10**9, type(caches._caches)()
    with caches.recalling(images, pixels, index):
        wanted = model.bank.frozen(pixels)
    with caches.recalling(images, other := torch.zeros_like(pixels), index):  # not looked at
        assert torch.equal(model.bank.frozen(other), wanted)
    with caches.recalling(images, other := torch.zeros_like(pixels), index + 1):  # one of them is not known
        assert not torch.equal(model.bank.frozen(other), wanted)
    monkeypatch.setattr(ExpertBank, "depth", 3)  # another trunk
    with caches.recalling(images, other := torch.zeros_like(pixels), index):
        assert not torch.equal(model.bank.frozen(other), wanted)


def test_threads_share_nothing(backbone):
    bank, seen = ExpertBank(backbone), []
    with bank.sharing() as trunk:
        thread = threading.Thread(target=lambda: seen.append(bank.trunk))
        thread.start()
        thread.join()
        with bank.sharing() as inner:
            assert inner is trunk is bank.trunk
    assert seen == [None] and bank.trunk is None


def test_an_expert_is_an_adapter_of_peft(stream, tmp_path):
    trainer = make_trainer(s_lora(r=2, expert_layers=[-2, -1]), tmp_path, num_train_epochs=1)
    trainer.learn(stream[0])
    name = trainer.model.bank.names[0]
    plain = PeftModel.from_pretrained(
        AutoModel.from_pretrained(bundled_folder("hf-clpeft/vit-tiny-glyphs"), add_pooling_layer=False),
        tmp_path / "experts" / name,
    )
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = plain.eval()(pixel_values=pixels).last_hidden_state[:, 0]
        assert torch.allclose(trainer.model.bank(pixels, torch.zeros(2, dtype=torch.int64)), wanted, atol=1e-5)
    assert {key.split(".layers.")[1][0] for key in trainer.model.bank[0].tensors} == {"4", "5"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (lambda: s_lora(expert_layers=[]), "rising"),
        (lambda: s_lora(expert_layers=[0]), "rising"),
        (lambda: s_lora(expert_layers=[2, 1]), "rising"),
        (lambda: s_lora(expert_layers=[7]), "has 6 layers"),
        (lambda: s_lora(expert_layers=[-7]), "has 6 layers"),
        (lambda: s_lora(expert_layers=[-1, 6]), r"must rise, but of 6 layers these are \[6, 6\]"),
        (lambda: s_lora(expert_layers=[6], lora={"target_modules": "all-linear"}), "list of names"),
        (lambda: s_lora(expert_layers=[6], lora={"target_modules": ["none_such"]}), "none_such"),
        (lambda: s_x(peft={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, expert_layers=[6]), "all layers"),
    ],
)
def test_layers_that_there_are_not_are_refused_before_training(options, says):
    with pytest.raises(HfClpeftError, match=says):
        ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", options())


def test_experts_of_other_layers_are_not_taken_over(stream, tmp_path):
    make_trainer(s_lora(expert_layers=[-1]), tmp_path / "one", num_train_epochs=1).learn(stream[0])
    with pytest.raises(ConfigError, match="expert_layers"):
        make_trainer(s_lora(expert_layers=[-2, -1]), tmp_path / "two", experts_from=str(tmp_path / "one"))


def test_the_recipe_counts_the_passes(tmp_path, monkeypatch, capsys):
    arguments = ["--model", "tiny", "--batch_size", "4", "--warmup", "0", "--repeats", "1", "--output_dir", "speed"]
    monkeypatch.setattr("sys.argv", ["upper_layers.py", *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "upper_layers.py"), run_name="__main__")
    rows = list(csv.DictReader(Path("speed/upper_layers.csv").read_text().splitlines()))
    predicted = [float(row["forwards"]) for row in rows if row["mode"] == "predict"]
    assert predicted == [2, 1.333, 1, 4, 2] and [float(row["forwards"]) for row in rows[5:]] == [1, 1, 0.333]


def test_training_on_fixed_views_runs_the_trunk_once_per_view(stream, tmp_path):
    options = {"augmentation": "crop_flip", "augmentation_views": 3, "num_train_epochs": 7, "logging_steps": 1}
    trainer = make_trainer(s_lora(expert_layers=[-1], query_layers=[5]), tmp_path / "cached", **options)
    counts, seen, unseen = watch(trainer.model), Losses(), Losses()
    trainer.callbacks.callbacks.append(seen)
    trainer.learn(stream[0])
    train, test = len(stream[0].train.dataset), len(stream[0].test.dataset)
    assert sum(counts) <= 5 * (3 * train + test) + 7 * train + test + 40  # probes, and embeddings of one image
    plain = make_trainer(s_lora(expert_layers=[-1], query_layers=[5]), tmp_path / "plain", trunk_cache_gb=0, **options)
    plain.callbacks.callbacks.append(unseen)
    plain.learn(stream[0])
    losses = [[value["train/loss"] for value in one.logged] for one in (seen, unseen)]
    assert len(losses[0]) > 7 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(trainer.model(pixels).logits, plain.model(pixels).logits, atol=1e-4)


def test_fixed_views_are_taken_in_turn_and_stay(stream, tmp_path, monkeypatch):
    """Every image is seen as it is, and in the same crop of it, in every second epoch, in whatever order."""
    seen, pixels_of = {}, Lesson.pixels

    def noted(lesson, batch):
        pixels = pixels_of(lesson, batch)
        for index, row in zip(batch["index"].tolist(), pixels, strict=True):
            seen[lesson.loop.progress.epoch, index] = row
        return pixels

    monkeypatch.setattr(Lesson, "pixels", noted)
    options = {"augmentation": "crop", "augmentation_views": 2, "num_train_epochs": 4, "train_batch_size": 5}
    make_trainer(s_lora(), tmp_path, **options).learn(stream[0])
    count = len(stream[0].train.dataset)
    first, second, third, fourth = (torch.stack([seen[epoch, i] for i in range(count)]) for epoch in range(4))
    assert torch.equal(first, third) and torch.equal(second, fourth)
    assert not torch.isclose(first, second).flatten(1).all(dim=1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation_views": 2}, "augmentation_views=2 must be from 0 to 0 with augmentation=none"),
        ({"augmentation_views": 3, "augmentation": "flip"}, "from 0 to 2 with augmentation=flip"),
        ({"augmentation_views": -1, "augmentation": "crop"}, "from 0 to 64 with augmentation=crop"),
    ],
)
def test_views_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ContinualTrainingArguments(**options)


def test_streamed_images_have_no_fixed_views(stream, tmp_path):
    options = {"augmentation": "crop", "augmentation_views": 2, "cache_size_gb": 1e-5}
    with pytest.raises(HfClpeftError, match="Leave out augmentation_views, or streaming and cache_size_gb"):
        make_trainer(s_lora(), tmp_path, **options).learn(stream[0])
