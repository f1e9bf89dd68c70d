"""The backbone of a saved model: of the commit it was trained on, with the pixels it was trained on, whoever asks."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import BACKBONE, make_trainer, pattern_dataset, vouch
from datasets import DatasetDict
from hub_server import Fault
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    TorchvisionBackend,
)

from hf_clpeft import (
    BackboneError,
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    HfClpeftError,
    combine,
    load_backbone,
    load_task,
    s_lora,
)
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.backbones.processors import read_processor
from hf_clpeft.training.experts_from import Donor
from hf_clpeft.training.options import BackboneArguments
from hf_clpeft.training.recipe import open_model


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture
def glyphs(tmp_path):
    """A folder with the bundled backbone."""
    return shutil.copytree(bundled_folder(BACKBONE), tmp_path / "glyphs")


@pytest.fixture
def saved(tmp_path):
    """A folder with a bundled model."""
    return shutil.copytree(bundled_folder("hf-clpeft/s-lora-digits"), tmp_path / "model")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, 50, 3), dtype=np.uint8)) for height in (40, 60)]


@pytest.fixture(scope="module")
def cropping(tmp_path_factory):
    """A model on a backbone whose pictures are resized to 36 and cropped to 32, as DINOv2's are to 256 and 224."""
    root = tmp_path_factory.mktemp("cropping")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(mlp_ratio=2, image_size=40, **SMALL)).save_pretrained(root / "vit")
    processor = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, resample=2)
    processor.save_pretrained(root / "vit")
    model = ContinualModel.from_backbone(str(root / "vit"), s_lora(k=1))
    trainer = make_trainer(s_lora(k=1), root / "out")
    rows = pattern_dataset(2, 4)["train"]
    ContinualTrainer(model, trainer.args).learn(load_task(DatasetDict(train=rows, test=rows), "task-000"))
    return root, model


def test_whoever_loads_a_model_sees_the_pixels_it_was_trained_on(cropping):
    root, model = cropping
    wanted = model.backbone.transform.resize(pictures())
    edit(root / "vit" / "preprocessor_config.json", resample=3)  # the saved file decides, not the checkpoint's
    loaded = ContinualModel.from_pretrained(root / "out")
    shutil.copytree(root / "out", root / "other")
    other = ContinualModel.from_pretrained(root / "other")
    other.config.tasks[0].name = "task-001"
    args = make_trainer(s_lora(k=1), root / "out", resume_from_checkpoint=str(root / "out")).args
    resumed = open_model(BackboneArguments(backbone=str(root / "vit")), args, loaded.config.method)
    seen = [loaded, combine([root / "out", root / "other"]), resumed, Donor(str(root / "out"), loaded).donor]
    for one in seen:
        assert np.array_equal(one.backbone.transform.resize(pictures()), wanted)
        assert np.array_equal(one.backbone.features(pictures()), model.backbone.features(pictures()))
    loaded.save_pretrained(root / "again")
    saved = [(root / name / "preprocessor_config.json").read_text() for name in ("out", "again")]
    assert saved[0] == saved[1]


def test_a_backbone_that_makes_other_pixels_is_refused(cropping):
    root, model = cropping
    assert ContinualModel.from_pretrained(root / "out", backbone=model.backbone).config.tasks
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2)
    other = load_backbone(str(root / "vit"), processor=processor)
    with pytest.raises(BackboneError, match="resized or normalised in another way .* size differ. Pass"):
        ContinualModel.from_pretrained(root / "out", backbone=other)


def test_another_size_keeps_the_share_that_is_cropped(cropping):
    processor = load_backbone(str(cropping[0] / "vit"), image_size=64).processor
    assert processor.size["shortest_edge"] == 72 and processor.crop_size["height"] == 64


def test_pillow_resizes_and_that_is_recorded(cropping, glyphs, tmp_path):
    saved = shutil.copytree(cropping[0] / "out", tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    assert config["backbone"]["resized_by"] == load_backbone(BACKBONE).processor.backend == "pil"
    edit(glyphs / "preprocessor_config.json", image_processor_type="ViTImageProcessorFast")
    assert not isinstance(load_backbone(str(glyphs)).processor, TorchvisionBackend)
    config["backbone"]["resized_by"] = "torchvision"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="resized by 'torchvision'"):
        ContinualModel.from_pretrained(saved)


def test_the_checkpoints_own_size_need_be_no_multiple_of_its_patches(tmp_path):
    SiglipVisionModel(SiglipVisionConfig(image_size=36, intermediate_size=32, **SMALL)).save_pretrained("vit")
    SiglipImageProcessorPil(size={"height": 36, "width": 36}).save_pretrained("vit")
    model = ContinualModel.from_backbone("vit", s_lora())
    model.save_pretrained("out")
    again = ContinualModel.from_pretrained("out")
    assert np.array_equal(model.backbone.features(pictures()), again.backbone.features(pictures()))
    SiglipImageProcessorPil(size={"height": 44, "width": 44}).save_pretrained("vit")
    with pytest.raises(
        BackboneError, match="outputs images of 44 px, not a multiple of its patch size 8; pass image_size=48"
    ):
        ContinualModel.from_backbone("vit", s_lora())


# The Hub


def test_the_commit_is_found_first_recorded_and_asked_for_ever_after(hub, glyphs):
    files = {path.name: path.read_bytes() for path in glyphs.iterdir()}
    hub.create("alice/vit")
    first = hub.commit("alice/vit", files)

    def change():
        hub.commit("alice/vit", {"preprocessor_config.json": b"{}", "config.json": b"{}"})

    hub.faults.append(Fault("GET", "/resolve/", before=change))  # after the first answer, all else is another's
    model = ContinualModel.from_backbone("alice/vit", s_lora(), cache_dir="cache")
    assert model.config.backbone.revision == first
    model.save_pretrained("out")
    hub.log.clear()
    again = ContinualModel.from_pretrained("out", cache_dir="cache")
    assert again.config.backbone.revision == first and not hub.log  # all of a commit is in the cache
    hub.faults.append(Fault(".*", ".*", cut=True, times=10**6))
    assert load_backbone("alice/vit", first, cache_dir="cache").config.revision == first
    with pytest.raises(BackboneError, match="'alice/vit' cannot be loaded .*Pass backbone="):
        ContinualModel.from_pretrained("out", cache_dir="other")


def test_a_branch_is_loaded_from_the_cache_without_a_network(hub, glyphs):
    hub.create("alice/vit")
    oid = hub.commit("alice/vit", {path.name: path.read_bytes() for path in glyphs.iterdir()})
    load_backbone("alice/vit", cache_dir="cache")
    hub.faults.append(Fault(".*", ".*", cut=True, times=10**6))
    for options in ({}, {"local_files_only": True}):
        assert load_backbone("alice/vit", cache_dir="cache", **options).config.revision == oid


def test_a_mirror_is_not_asked_for_the_commit_of_the_original(hub, glyphs):
    files = {path.name: path.read_bytes() for path in glyphs.iterdir()}
    for repo, more in (("alice/vit", {}), ("bob/vit", {"note.txt": b"a mirror"})):
        hub.create(repo)
        hub.commit(repo, files | more)
    model = ContinualModel.from_backbone("alice/vit", s_lora(), cache_dir="cache")
    model.save_pretrained("out")
    for elsewhere in ("bob/vit", "bob/vit@main", str(glyphs)):
        again = ContinualModel.from_pretrained("out", backbone=elsewhere, cache_dir="cache")
        assert again.config.backbone == model.config.backbone
    with pytest.raises(BackboneError, match="no revision 'v9'"):
        ContinualModel.from_pretrained("out", backbone="bob/vit@v9", cache_dir="cache")


def test_a_folder_has_no_commit(glyphs):
    assert load_backbone(str(glyphs), revision="main").config.revision is None


# Strangers


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": 10**9, "intermediate_size": 10**9}, "at most 10,000,000"),
        ({"hidden_size": 4_000_000}, "do not match"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000; at most 1,000"),
        ({"num_hidden_layers": 200}, "do not match"),
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"image_size": 100_000}, "would exhaust the memory|do not match"),
        ({"image_size": 10**18}, "at most 10,000,000"),
        ({"image_size": 10**30}, "at most 63 are read"),
        ({"image_size": [32, 64]}, "only square ones"),
        ({"patch_size": 0}, "cannot be built|does not support"),
        ({"num_channels": 4}, "only RGB .3. and greyscale .1."),
        ({"hidden_act": "eval"}, "cannot be built"),
        ({"hidden_size": "wide"}, "cannot be"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "custom code that is never run"),
        ({"model_type": "evil"}, "cannot be loaded"),
        ({"model_type": "bert"}, "do not match|does not support"),
        ({"attn_implementation": "evil/kernel"}, "code from the Hub"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"depths": [1] * 2000}, "lists 2,000 values"),
    ],
)
def test_an_absurd_configuration_is_refused_before_it_is_built(glyphs, values, message):
    edit(glyphs / "config.json", **values)
    with pytest.raises(BackboneError, match=message) as error:
        load_backbone(str(glyphs))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"size": {"height": 10**6, "width": 10**6}}, "size|height=1000000; at most 4,096"),
        ({"size": {"shortest_edge": 10**9}}, "shortest_edge=1000000000"),
        ({"size": {"height": 32, "width": 48}}, "square images of one size"),
        ({"size": {"shortest_edge": 32}}, "square images of one size"),
        ({"size": {"height": -3, "width": -3}}, "cannot resize"),
        ({"image_mean": [0.5]}, "normalises with"),
        ({"image_mean": [float("nan")] * 3}, "NaN is not a finite number"),
        ({"image_processor_type": "OneFormerImageProcessor"}, "does more than resize"),
        ({"image_processor_type": "EvilProc", "auto_map": {"AutoImageProcessor": "evil.C"}}, "is unknown or"),
        ({"resample": 77}, "cannot resize"),
    ],
)
@pytest.mark.parametrize("of", ["backbone", "model"])
def test_an_absurd_image_processor_is_refused(glyphs, saved, of, values, message):
    folder = glyphs if of == "backbone" else saved
    edit(folder / "preprocessor_config.json", **values)
    with pytest.raises(BackboneError, match=message) as error:
        if of == "backbone":
            load_backbone(str(glyphs))
        else:
            vouch(saved)
            ContinualModel.from_pretrained(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, -32, 4000, 100_000, 2**70])
def test_an_absurd_size_in_a_saved_model_is_refused(saved, size):
    config = json.loads((saved / "config.json").read_text())
    config["backbone"]["image_size"] = size
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="image_size"):
        ContinualModel.from_pretrained(saved)


@pytest.mark.parametrize("size", [1024, 4000, 80_000])
def test_a_size_for_which_there_is_no_memory_is_refused(size):
    with pytest.raises(BackboneError, match=f"image_size={size} .*(at most|GiB for one tensor)"):
        load_backbone(BACKBONE, image_size=size)


def test_a_folder_without_what_is_needed_is_told_what_it_lacks(glyphs):
    (glyphs / "preprocessor_config.json").unlink()
    with pytest.raises(BackboneError, match="has no preprocessor_config.json"):
        load_backbone(str(glyphs))
    (glyphs / "model.safetensors").rename(glyphs / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="has no model.safetensors"):
        load_backbone(str(glyphs))
    (glyphs / "config.json").unlink()
    with pytest.raises(BackboneError, match="has no config.json"):
        load_backbone(str(glyphs))


def test_a_timm_checkpoint_is_resized_as_timm_does_and_asks_for_timm(glyphs):
    pretrained = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    pretrained |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    values = {"architecture": "vit_tiny_patch16_224", "num_features": 192, "pretrained_cfg": pretrained}
    (glyphs / "config.json").write_text(json.dumps(values))
    (glyphs / "preprocessor_config.json").unlink()
    processor = read_processor(glyphs, "timm's")
    assert processor.size["shortest_edge"] == 35 and processor.crop_size["height"] == 32 and processor.resample == 3
    if find_spec("timm") is None:
        with pytest.raises(HfClpeftError, match="timm"):
            load_backbone(str(glyphs))
