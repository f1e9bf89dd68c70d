"""Quantised backbones: experts stay in full precision, and are the same adapters."""

import json
from importlib.util import find_spec

import PIL.Image
import pytest
import torch
from transformers import BitsAndBytesConfig

from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, ExpertBank, s_lora
from hf_clpeft.backbones import BackboneError, load_backbone
from hf_clpeft.config.errors import OptionError
from hf_clpeft.experts.expert import ExpertError, Seal, make_peft_config
from hf_clpeft.streams import load_benchmark
from hf_clpeft.training.options import BackboneArguments, StreamArguments, parse
from hf_clpeft.training.recipe import learn


BACKBONE = "hf-clpeft/vit-tiny-glyphs"


@pytest.fixture
def int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def images(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["auto", "grouped"])
def test_lora_on_a_quantised_backbone_is_fused_and_in_full_precision(int8, form):
    full, backbone = load_backbone(BACKBONE), load_backbone(BACKBONE, quantization_config=int8)
    assert type(backbone.model.layers[0].attention.q_proj.weight).__name__ == "Int8Tensor"
    assert backbone.config == full.config  # the hash is that of the checkpoint
    change = (full(images()) - backbone(images())).norm() / full(images()).norm()
    assert 0 < change < 0.05
    bank = ExpertBank(backbone, form)
    slot = bank.start("one", make_peft_config({"peft_type": "LORA", "r": 2}, backbone))
    trained = [parameter for parameter in slot.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    bank.under_training(images()).sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1
        alone = bank.under_training(images())
    expert = bank.finish("one")
    assert bank.table is not None
    again = ExpertBank(backbone, form)
    again.extend([expert])
    with torch.no_grad():
        found = again(images(), torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_a_change_of_quantised_weights_is_noticed(int8):
    model = load_backbone(BACKBONE, quantization_config=int8).model
    seal = Seal(model)
    seal.check("Nobody")
    weight = model.layers[0].attention.q_proj.weight
    name, _ = weight.__tensor_flatten__()
    getattr(weight, name[0]).view(-1)[0] += 1
    with pytest.raises(ExpertError, match=r"changes layers\.0\.attention\.q_proj\.weight"):
        seal.check("Somebody")


def test_a_model_is_trained_on_one_and_runs_on_the_other(int8, tmp_path):
    stream = load_benchmark("digits", num_tasks=2, max_train_samples_per_task=64, max_test_samples_per_task=16)
    model = ContinualModel.from_backbone(BACKBONE, s_lora(r=1, k=2), quantization_config=int8)
    args = ContinualTrainingArguments(output_dir=str(tmp_path), num_train_epochs=1, disable_tqdm=True)
    report = ContinualTrainer(model, args).learn_stream(stream)
    assert report.environment["quantization"]["quant_method"] == "torchao"
    picture = [PIL.Image.new("RGB", (8, 8), "white")]
    (expected,) = model.predict(picture)
    (same,) = ContinualModel.from_pretrained(tmp_path, quantization_config=int8).predict(picture)
    (near,) = ContinualModel.from_pretrained(tmp_path).predict(picture)
    assert (same.label, same.score, same.expert) == (expected.label, expected.score, expected.expert)
    assert near.expert == expected.expert and abs(near.score - expected.score) < 0.05


def test_a_library_that_is_missing_is_named():
    if find_spec("bitsandbytes") is not None:
        pytest.skip("it is installed")
    with pytest.raises(BackboneError, match="cannot be loaded: .*bitsandbytes"):
        load_backbone(BACKBONE, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_command_line_names_the_quantisation(tmp_path):
    words = ["--benchmark", "digits", "--quantization"]
    for given, message in (
        ("3bit", "not int8, 8bit, 4bit"),
        ('{"quant_method": "magic"}', "transformers cannot use it"),
    ):
        with pytest.raises(OptionError, match=message):
            parse((StreamArguments, BackboneArguments), [*words, given])
    given = json.dumps({"quant_method": "bitsandbytes", "load_in_8bit": True})
    _, backbone = parse((StreamArguments, BackboneArguments), [*words, given])
    assert backbone.loading["quantization_config"].load_in_8bit
    assert "quantization_config" not in BackboneArguments().loading
    if find_spec("bitsandbytes") is None:
        with pytest.raises(OptionError, match="4bit' needs bitsandbytes; run `pip install bitsandbytes`"):
            parse((StreamArguments, BackboneArguments), [*words, "4bit"])


def test_a_recipe_trains_on_a_quantised_backbone_and_resumes(int8, tmp_path):
    options = {"num_train_epochs": 1, "disable_tqdm": True, "resume_from_checkpoint": "auto"}
    args = ContinualTrainingArguments(output_dir=str(tmp_path), **options)
    stream = load_benchmark("digits", num_tasks=2, max_train_samples_per_task=32, max_test_samples_per_task=8)
    for tasks in (stream[:1], stream):
        report = learn(tasks, BackboneArguments(BACKBONE, quantization="int8"), args, s_lora(k=2))
        assert report.environment["quantization"]["quant_method"] == "torchao"
