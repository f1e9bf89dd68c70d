"""Experts in PEFT's own format, never loaded in part, and run in mixed batches as PEFT runs them alone."""

import json

import pytest
import torch
from conftest import BACKBONE
from peft import PeftConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_clpeft import Expert, ExpertBank, ExpertError, PromptTunedVisionModel, load_backbone
from hf_clpeft.experts.expert import make_peft_config, make_peft_model


LORA = {"peft_type": "LORA", "r": 2}
PROMPTS = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def add_random_expert(bank, name, arguments, seed):
    """An expert whose every weight matters."""
    generator = torch.Generator().manual_seed(seed)
    peft_model = bank.start(name, make_peft_config(arguments, bank.backbone))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return bank.finish(name)


@pytest.fixture(params=[LORA, PROMPTS], ids=["lora", "prompts"])
def bank(request, fresh_backbone):
    bank = ExpertBank(fresh_backbone)
    for i in range(3):
        add_random_expert(bank, f"task-{i}", request.param, seed=i)
    return bank


def features_with_peft(expert, folder):
    """Features by PEFT alone, from the files."""
    expert.save(folder)
    model = load_backbone(BACKBONE).model
    make = PromptTunedVisionModel if expert.config.is_prompt_learning else PeftModel
    return make.from_pretrained(model, folder)(pixel_values=IMAGES).last_hidden_state[:, 0]


def test_a_saved_expert_gives_the_same_features_with_peft(bank, tmp_path):
    with torch.no_grad():
        for i, expert in enumerate(bank):
            ours = bank(IMAGES, torch.full((6,), i))
            torch.testing.assert_close(ours, features_with_peft(expert, tmp_path / expert.name), atol=1e-5, rtol=0)


def test_a_lora_expert_loads_with_plain_peft_and_a_plain_automodel(fresh_backbone, tmp_path):
    from importlib.resources import files

    bank = ExpertBank(fresh_backbone)
    add_random_expert(bank, "task-0", LORA, seed=0).save(tmp_path / "expert")
    path = files("hf_clpeft") / "assets" / "vit-tiny-glyphs"
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(path, add_pooling_layer=False), tmp_path / "expert")
    with torch.no_grad():
        expected = plain(pixel_values=IMAGES).last_hidden_state[:, 0]
        torch.testing.assert_close(bank(IMAGES, torch.zeros(6, dtype=int)), expected, atol=1e-5, rtol=0)


def test_frozen_features_do_not_see_the_expert_in_the_slot(bank, backbone):
    with torch.no_grad():
        bank(IMAGES, torch.zeros(6, dtype=int))
        torch.testing.assert_close(bank.frozen(IMAGES), backbone(IMAGES), atol=0, rtol=0)
        assert not torch.equal(bank(IMAGES, torch.zeros(6, dtype=int)), backbone(IMAGES))


def test_only_the_expert_in_the_slot_is_trainable(bank):
    slot = bank.start("new", bank[0].config)
    trainable = sum(parameter.numel() for parameter in slot.parameters() if parameter.requires_grad)
    assert trainable == bank[0].num_parameters


def test_training_an_expert_leaves_the_others_bit_identical(bank):
    before = [{key: tensor.clone() for key, tensor in expert.tensors.items()} for expert in bank]
    arguments = LORA if "LORA" in str(bank[0].config.peft_type) else PROMPTS
    add_random_expert(bank, "task-3", arguments, seed=3)
    for old, expert in zip(before, bank, strict=False):
        assert all(torch.equal(old[key], expert.tensors[key]) for key in old)


def test_prompts_stand_behind_cls_in_the_output(fresh_backbone):
    model = PromptTunedVisionModel(fresh_backbone.model, PromptTuningConfig(num_virtual_tokens=3))
    plain = fresh_backbone.model.embeddings._forward_hooks
    assert len(plain) == 1
    with torch.no_grad():
        tokens = model.base_model.embeddings(IMAGES)
    prompt = model.prompt_encoder["default"].embedding.weight
    assert tokens.shape[1] == 1 + 3 + 16
    torch.testing.assert_close(tokens[:, 1:4], prompt.detach().expand(6, -1, -1))
    model.unload()
    assert not plain


def test_prompt_files_are_pefts(fresh_backbone, tmp_path):
    bank = ExpertBank(fresh_backbone)
    expert = add_random_expert(bank, "task-0", PROMPTS, seed=0)
    expert.save(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PromptTuningConfig) and config.num_virtual_tokens == 3
    assert config.base_model_name_or_path == BACKBONE


def saved_expert(bank, folder, change):
    bank[0].save(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_missing_tensor_is_never_replaced_by_an_untrained_one(bank, tmp_path):
    if len(bank[0].tensors) == 1:
        pytest.skip("a prompt is one tensor")
    folder = saved_expert(bank, tmp_path, lambda tensors: tensors.popitem())
    with pytest.raises(ExpertError, match="has shape None and should have"):
        bank.extend([Expert.load("half", folder)])


def test_a_tensor_under_an_old_name_is_an_error(bank, tmp_path):
    def rename(tensors):
        key, tensor = tensors.popitem()
        tensors["base_model.model.encoder.query.lora_A.weight"] = tensor

    with pytest.raises(ExpertError, match="does not fit a bank with"):
        bank.extend([Expert.load("old", saved_expert(bank, tmp_path, rename))])


def test_a_tensor_of_another_shape_is_an_error(bank, tmp_path):
    def widen(tensors):
        key, tensor = tensors.popitem()
        tensors[key] = torch.zeros(tensor.shape[0] + 1, tensor.shape[1])

    with pytest.raises(ExpertError, match="does not fit a bank with"):
        bank.extend([Expert.load("wide", saved_expert(bank, tmp_path, widen))])


def test_a_value_that_is_not_finite_is_an_error(bank, tmp_path):
    def spoil(tensors):
        next(iter(tensors.values()))[0] = torch.nan

    with pytest.raises(ExpertError, match="not finite"):
        Expert.load("nan", saved_expert(bank, tmp_path, spoil))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(bank, tmp_path, file):
    bank[0].save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ExpertError, match=file):
        Expert.load("task-0", tmp_path)


def test_a_truncated_file_is_an_error(bank, tmp_path):
    bank[0].save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ExpertError, match="damaged"):
        Expert.load("task-0", tmp_path)


def test_an_unknown_technique_is_refused(fresh_backbone):
    with pytest.raises(ExpertError, match="'TELEPATHY' is none of the PEFT techniques that work here"):
        make_peft_config({"peft_type": "TELEPATHY"}, fresh_backbone)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("target_modules", [None, "q_proj"], r"target_modules=\[None, 'q_proj'\] must be a list of up to 1,000 names"),
        ("target_modules", [], "PEFT cannot attach a LORA adapter to"),
        ("monteclora_config", {"": 0}, r"monteclora_config=\{'': 0\} is no option of LORA that an expert may have"),
    ],
)
def test_a_configuration_that_peft_stumbles_over_is_an_error(fresh_backbone, tmp_path, field, value, message):
    config = make_peft_config({"peft_type": "LORA", "r": 1}, fresh_backbone)
    Expert.from_peft_model("task-000", make_peft_model(fresh_backbone, config)).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ExpertError, match=message):
        make_peft_model(load_backbone(BACKBONE), Expert.load("task-000", tmp_path).config)
