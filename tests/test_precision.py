"""A model answers in every precision that PyTorch offers, and none of them changes what is saved."""

import json
from contextlib import contextmanager

import pytest
import torch
from conftest import BACKBONE, make_trainer, pattern_dataset
from test_bank import TECHNIQUES, bank_of, images, random_experts, small_backbone

from hf_clpeft import ContinualModel, ExpertBank, s_lora
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.methods import l2p, ranpac, s_lora_mix, s_lora_pp, slda
from hf_clpeft.streams import TaskStream
from hf_clpeft.streams.images import open_image
from hf_clpeft.training.processes import TrainingError


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CASTS = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "half and back": lambda model: model.half().float(),
}
AROUND = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
}
BUNDLED = ["s-lora", "s-lora-pp", "s-prompts", "s-lora-mix", "l2l", "l2p"]


@pytest.fixture(scope="module")
def pictures():
    paths = sorted((bundled_folder("hf-clpeft/s-lora-digits") / "examples").glob("*.png"))
    return [open_image(path) for path in paths]


def kept(model):
    """What must never be rounded."""
    parts = [part for part in (model.router, model.heads, model.bank.table) if part is not None]
    return [tensor for part in parts for tensor in part.state_dict().values() if tensor.is_floating_point()]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_model_answers_alike_in_every_precision_and_saves_the_same_files(name, pictures, tmp_path):
    def load():
        return ContinualModel.from_pretrained(f"hf-clpeft/{name}-digits")

    def saved(model, folder):
        model.unchanged.clear()
        model.save_pretrained(tmp_path / folder)
        return json.loads((tmp_path / folder / "config.json").read_text())["files"]

    right, files = [p.label for p in load().predict(pictures)], saved(load(), "whole")
    for what, cast in CASTS.items():
        model = cast(load())
        found = [p.label for p in model.predict(pictures)]
        assert sum(a == b for a, b in zip(found, right, strict=True)) >= len(right) - 1, what
        assert {tensor.dtype for tensor in kept(model)} == {torch.float32}
        if what == "half":
            assert saved(model, what) == files
    for what in ("autocast to bfloat16", "default float64"):
        model = load()
        with AROUND[what]():
            found = [[p.label for p in model.predict(pictures)], [p.label for p in load().predict(pictures, top_k=2)]]
        for labels in found:
            assert sum(a == b for a, b in zip(labels, right, strict=True)) >= len(right) - 1, what


METHODS = {
    "prototypes, grouped": (s_lora_pp(k="auto", lora={"use_dora": True}), "default float64"),
    "mix": (s_lora_mix(), "bfloat16"),
    "pool": (l2p(prompt_length=2, pool_size=4, top_n=2), "autocast to bfloat16"),
    "gaussian": (slda(), "half"),
    "ridge": (ranpac(projection_size=64), "default float64"),
    "ridge, autocast": (ranpac(projection_size=64), "autocast to bfloat16"),
}


@pytest.mark.parametrize("method, around", METHODS.values(), ids=METHODS)
def test_a_task_can_be_learnt_in_any_precision(method, around):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    with AROUND.get(around, lambda: default_dtype(torch.float32))():
        trainer = make_trainer(method, num_train_epochs=1, augmentation="crop_flip")
        CASTS.get(around, lambda model: model)(trainer.model)
        trainer.learn_stream(stream)
    assert {tensor.dtype for tensor in kept(trainer.model)} == {torch.float32}
    loaded, pictures = ContinualModel.from_pretrained("out"), [row["image"] for row in pattern_dataset()["test"]]
    found, expected = (model.predict(pictures) for model in (loaded, trainer.model.float()))
    agreed = sum(a.label == b.label for a, b in zip(found, expected, strict=True))
    assert agreed >= len(pictures) - 2


@pytest.mark.parametrize("name", ["dora", "ia3", "oft", "lora_on_patches", "lora", "prompts"])
def test_every_technique_runs_in_every_precision(name):
    more = {"lora": {"peft_type": "LORA", "r": 2}, "prompts": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}}
    experts = random_experts(small_backbone(), [(TECHNIQUES | more)[name]] * 3)
    pixels, selection = images(4), torch.tensor([2, 0, 1, 0])
    with torch.no_grad():
        expected = bank_of(experts)(pixels, selection)
        found = [cast(bank_of(experts))(pixels, selection) for cast in CASTS.values()]
        for around in AROUND.values():
            bank, empty = bank_of(experts), ExpertBank(small_backbone())
            with around():  # one expert after another within it: nothing may be left of the one before
                empty.extend(experts)
                found += [bank(pixels, selection), empty(pixels, selection)]
    for features in found:
        assert (features.float() - expected).norm() < 0.05 * expected.norm()


def test_a_model_moves_between_devices_with_everything_it_keeps():
    model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits").to("meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits").to("meta", torch.float16)
    assert model.router.prototypes.device.type == "meta" and model.router.prototypes.dtype == torch.float32


def test_features_that_are_not_finite_name_the_learning_rate():
    trainer = make_trainer(s_lora(k=2), num_train_epochs=1)
    trainer.args.learning_rate = 1e30  # the last step is the one too far
    with pytest.raises(TrainingError, match="Features are not finite: .*training has diverged .lower learning_rate."):
        trainer.learn_stream(TaskStream.class_incremental(pattern_dataset(), num_tasks=2))


def test_the_bundled_backbone_is_asked_in_its_own_precision():
    for dtype in ("bfloat16", "float16"):
        model = ContinualModel.from_backbone(BACKBONE, s_lora(), dtype=dtype)
        assert model.method.query(torch.zeros(2, 3, 32, 32)).dtype == torch.float32
        assert model.backbone(torch.zeros(2, 3, 32, 32)).dtype == getattr(torch, dtype)
