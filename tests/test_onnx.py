"""ONNX graphs say in onnxruntime what the model says, and need nothing else of this library."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONE, EXAMPLES, SEVEN
from test_cli import run
from test_every_method import options_of, taught_on_two_layers
from test_export import logits_of, one_layer, two_layers, untaught
from transformers import AutoImageProcessor

from hf_clpeft import ConfigError, ContinualModel, ExpertError, load_backbone
from hf_clpeft.backbones.transform import ImageTransform
from hf_clpeft.config import ContinualConfig
from hf_clpeft.export import export_adapter, export_onnx, graph, onnx


onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def _operators_once():
    """What torch can say in ONNX is read anew for every graph, out of the source of a library that does not change."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError, AttributeError):  # of torch's own: another one may have it elsewhere
            from torch.onnx._internal.exporter import _registration

            read = _registration.onnxscript_apis.get_torchlib_ops
            patch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", cache(read))
        yield


METHODS = ("s_lora", "s_lora_mix", "s_prompts_pp", "l2p", "ease", "slda_pp")


def answers(folder, pixels):
    session = onnxruntime.InferenceSession(str(Path(folder, "model.onnx")))
    assert [given.name for given in session.get_inputs()] == ["pixel_values"]
    names = [given.name for given in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixel_values": pixels.numpy()}), strict=True))


def images(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", METHODS)
def test_a_routed_model_is_one_graph_for_batches_of_any_size(name, backbone, tmp_path):
    model = taught_on_two_layers(name, backbone, tmp_path / "run")
    facts = export_onnx(model, "graph")
    assert facts["difference"] < 1e-4 and facts["bytes"] == Path("graph/model.onnx").stat().st_size
    config = json.loads(Path("graph/config.json").read_text())
    assert list(config["id2label"].values()) == model.config.classes
    for count in (1, 3, 8):
        found = answers("graph", images(count))
        with torch.no_grad():
            wanted = model(images(count))
        known = wanted.logits.isfinite().numpy()
        assert np.array_equal(np.isfinite(found["logits"]), known)
        largest = max(1, np.abs(wanted.logits.numpy()[known]).max())
        np.testing.assert_allclose(found["logits"][known], wanted.logits.numpy()[known], atol=1e-4 * largest, rtol=0)
        routed = model.predict(SEVEN)[0].expert is not None
        assert ("expert" in found) == routed == bool(config["hf_clpeft"]["experts"])
        if routed:
            assert np.array_equal(found["expert"], wanted.selection.reshape(count, -1)[:, 0].numpy())


def test_one_expert_is_a_plain_classifier(backbone):
    model = untaught(backbone=two_layers(backbone))
    export_onnx(model, "plain", task="task-001")
    for count in (1, 5):
        np.testing.assert_allclose(
            answers("plain", images(count))["logits"], logits_of(model, 1, images(count)), 0, 1e-4
        )
    config = json.loads(Path("plain/config.json").read_text())
    assert config["id2label"] == {"0": "owl", "1": "emu"} and config["architectures"] == ["ViTForImageClassification"]
    assert config["model_type"] == "vit"  # by which others know how to load it
    assert AutoImageProcessor.from_pretrained("plain").size["height"] == 32


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return folder, export_onnx(digits, folder / "int8", int8=True, pictures=EXAMPLES)


def test_its_folder_is_used_without_torch(exported, digits):
    folder, facts = exported
    script, picture = folder / "int8" / "predict.py", SEVEN
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'hf_clpeft', 'onnx']));"
        "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, script, picture], capture_output=True, text=True, check=True)
    Path("broken.png").write_bytes(picture.read_bytes()[:60])
    both = subprocess.run([sys.executable, script, "broken.png", picture], capture_output=True, text=True)
    assert both.returncode == 1 and both.stdout == done.stdout
    assert both.stderr.startswith("error: broken.png cannot be read: ") and len(both.stderr.splitlines()) == 1
    answer, wanted = json.loads(done.stdout.removeprefix(str(picture))), digits.predict(picture, top_k=3)[0]
    assert next(iter(answer["classes"])) == wanted.label and answer["expert"] == wanted.expert
    assert answer["classes"][wanted.label] == pytest.approx(wanted.score, abs=0.2)
    assert facts["agreement"] > 0.9 and facts["pictures"] == len(EXAMPLES)


def test_int8_is_smaller_and_leaves_router_and_heads_as_they_are(exported, digits):
    import onnx as library

    loaded = library.load(exported[0] / "int8" / "model.onnx")
    kinds = [node.op_type for node in loaded.graph.node]
    assert kinds.count("MatMulInteger") >= 6 * digits.backbone.num_layers
    rounded = sum(
        np.prod(item.dims) for item in loaded.graph.initializer if item.data_type == library.TensorProto.INT8
    )
    assert rounded > 0.6 * sum(weight.numel() for weight in digits.backbone.parameters())
    exact = {item.name for item in loaded.graph.initializer if item.data_type == library.TensorProto.FLOAT}
    assert any(name.endswith("router.prototypes") for name in exact) and any("heads" in name for name in exact)


def test_nothing_of_this_machine_is_written(exported):
    assert b"site-packages" not in (exported[0] / "int8" / "model.onnx").read_bytes()
    assert str(Path(onnx.__file__).parents[1]).encode() not in (exported[0] / "int8" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    "settings", [{}, {"size": {"shortest_edge": 40}, "do_center_crop": True}, {"do_rescale": False}]
)
def test_the_script_prepares_pictures_as_the_model_does(settings, backbone, tmp_path):
    from transformers import BitImageProcessorPil

    kind = BitImageProcessorPil if settings.get("do_center_crop") else type(backbone.processor)
    processor = kind.from_dict({**backbone.processor.to_dict(), "crop_size": {"height": 32, "width": 32}, **settings})
    processor.save_pretrained(tmp_path)
    shutil.copy(onnx.ASSETS / "onnx" / onnx.SCRIPT, tmp_path)
    model = untaught(backbone=two_layers(backbone))
    model.backbone.transform = ImageTransform(processor)
    assert onnx._prepares(tmp_path, model)
    unlike = kind.from_dict({**processor.to_dict(), "image_mean": [0.1, 0.5, 0.5]})
    model.backbone.transform = ImageTransform(unlike)
    assert not onnx._prepares(tmp_path, model)


def test_what_cannot_be_a_graph_is_refused_and_nothing_is_written(backbone, monkeypatch):
    dora = untaught(backbone=one_layer(backbone), lora={"use_dora": True})
    half = untaught(backbone=load_backbone(BACKBONE, dtype="bfloat16"))
    none = untaught(backbone=one_layer(backbone), tasks=())
    model = untaught(backbone=one_layer(backbone))
    cases = [
        (dora, {}, ExpertError, "one after another"),
        (half, {}, ExpertError, "load it in float32"),
        (none, {}, ConfigError, "learnt no task"),
        (model, {"task": "task-009"}, ConfigError, "task-009"),
    ]
    for wrong, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            export_onnx(wrong, "graph", **options)
    monkeypatch.setattr(graph, "run_graph", lambda session, pixels: [np.zeros((len(pixels), 2))])
    with pytest.raises(ExpertError, match="differ"):
        export_onnx(model, "graph", task="task-000")
    monkeypatch.setattr(graph, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ConfigError, match=r'onnxscript: pip install "hf-clpeft\[onnx\]"'):
        export_onnx(model, "graph")
    assert not Path("graph").exists()


def test_operators_that_onnx_lacks_are_named(backbone):
    tiny, options = one_layer(backbone), options_of("klda")
    model = ContinualModel(tiny, ContinualConfig(options, tiny.config))
    model.start_task("pets", ["cat", "dog"])
    labels = torch.tensor([0, 1] * 4)
    model.finish_task(lambda features, *views: (features(images(8)), labels), num_train_images=8)
    with pytest.raises(ExpertError, match=r"no operator for aten.linalg_solve_triangular.*Choose another router"):
        export_onnx(model, "graph")


def test_a_rounded_graph_that_names_other_classes_is_refused(backbone, monkeypatch, caplog):
    model = untaught(backbone=one_layer(backbone))
    monkeypatch.setattr(onnx, "LEAST_AGREEMENT", 1.1)
    with pytest.raises(ConfigError, match="too few: export it without int8"):
        export_onnx(model, "graph", task="task-000", int8=True, pictures=EXAMPLES)
    assert not Path("graph").exists()
    export_onnx(model, "graph", task="task-000", int8=True)
    assert "which are invented" in caplog.text


def test_another_model_is_not_overwritten_unless_told(backbone):
    model, other = untaught(backbone=one_layer(backbone)), untaught(backbone=one_layer(backbone))
    export_adapter(other, "task-000", "taken")
    for folder, first in (("taken", None), ("graph", lambda: export_onnx(other, "graph", task="task-000"))):
        if first:
            first()
        before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        with pytest.raises(ConfigError, match="belongs to another model"):
            export_onnx(model, folder, task="task-001")
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
    export_onnx(model, "graph", task="task-001", overwrite=True)
    assert list(json.loads(Path("graph/config.json").read_text())["id2label"].values()) == ["owl", "emu"]


def test_a_model_in_use_is_not_changed(backbone):
    model = untaught(backbone=two_layers(backbone))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        said = model(images(3)).logits
    export_onnx(model, "graph")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images(3)).logits, said)


WRONG = {
    "no task": ((), "Name the task"),
    "merged twice": (("task-001", "--onnx", "--merge"), "leave out --merge"),
    "int8 of what": (("task-001", "--int8"), "--int8 goes with --onnx"),
    "pictures for what": (("--onnx", "--pictures", "."), "--pictures with --int8"),
}


@pytest.mark.parametrize("words, message", WRONG.values(), ids=WRONG)
def test_the_command_refuses_what_makes_no_sense(words, message):
    result = run("export", "hf-clpeft/s-lora-digits", *words, "-o", "graph", fails=True)
    assert result.exception.exit_status == 2 and message in str(result.exception)
    assert not Path("graph").exists()


def test_the_command_tells_what_it_wrote():
    words = ("task-001", "--onnx", "--int8", "--pictures", EXAMPLES[0].parent, "-o", "graph", "--device", "cpu")
    found = json.loads(run("export", "hf-clpeft/s-lora-digits", *words, "--json"))
    assert found["task"] == "task-001" and found["what"].endswith("int8") and "of 10 pictures" in found["same answers"]
    assert sorted(path.name for path in Path("graph").iterdir()) == sorted(
        ["config.json", "model.onnx", "predict.py", "preprocessor_config.json"]
    )
