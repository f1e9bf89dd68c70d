"""Adapters with the names of an earlier transformers give the features that they were trained to give."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import DeiTConfig, DeiTModel, Dinov2Config, Dinov2Model

from hf_clpeft import Backbone, Expert, ExpertBank, ExpertError
from hf_clpeft.experts.expert import make_peft_config
from hf_clpeft.experts.naming import migrate_adapter, rename_old_keys


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OLD_NAMES = {  # of ViT before transformers 5.9, by hand
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def trained(backbone, **arguments):
    """A bank with an expert whose every weight matters."""
    bank = ExpertBank(backbone)
    config = make_peft_config({"peft_type": "LORA", "r": 2, **arguments}, backbone)
    generator = torch.Generator().manual_seed(0)
    for parameter in bank.start("task-0", config).parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    bank.finish("task-0")
    return bank


def old_key(key, names=None, wrapper=""):
    for new, old in (names or OLD_NAMES).items():
        key = key.replace(new, old)
    return key.replace("base_model.model.", f"base_model.model.{wrapper}", 1)


def as_trained_before(expert, wrapper="", names=None, **config):
    tensors = {old_key(key, names, wrapper): tensor for key, tensor in expert.tensors.items()}
    old = replace(expert, tensors=tensors, config=copy.copy(expert.config))
    for name, value in config.items():
        setattr(old.config, name, value)
    return old


def features(backbone, *experts):
    bank = ExpertBank(backbone)
    bank.extend(experts)
    with torch.no_grad():
        return bank(IMAGES, torch.zeros(4, dtype=int))


EVERY_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
ADAPTERS = {
    "names": ({}, {"target_modules": {"query", "value"}}),
    "pattern": ({}, {"target_modules": r"(vit\.)?encoder\.layer\.\d+\.attention\.attention\.(query|value)"}),
    "already renamed": ({}, {"target_modules": {"q_proj", "v_proj"}}),
    "one old name for three": (
        {"target_modules": EVERY_LINEAR},
        {"target_modules": {"query", "key", "value", "dense"}},
    ),
    "one old name for one of three": (
        {"target_modules": {"o_proj", "v_proj"}},
        {"target_modules": {"attention.output.dense", "value"}},
    ),
    "excluded": (
        {"target_modules": {"fc1", "fc2"}},
        {"target_modules": {"dense"}, "exclude_modules": ".*attention.*"},
    ),
    "some layers": (
        {"target_modules": {"layers.1.attention.q_proj"}},
        {"target_modules": {"query"}, "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "ranks": (
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.attention.v_proj": 5}},
        {
            "target_modules": {"query", "value"},
            "rank_pattern": {"query": 3},
            "alpha_pattern": {"layer.0.attention.attention.value": 5},
        },
    ),
    "DoRA": ({"use_dora": True}, {"target_modules": {"query", "value"}}),
}


@pytest.mark.parametrize("wrapper", ["", "vit."])
@pytest.mark.parametrize("new, old", ADAPTERS.values(), ids=ADAPTERS)
def test_a_migrated_adapter_gives_the_features_of_the_original(fresh_backbone, backbone, tmp_path, new, old, wrapper):
    bank = trained(fresh_backbone, **new)
    as_trained_before(bank[0], wrapper, **old).save(tmp_path / "old")
    renamed = migrate_adapter(tmp_path / "old", tmp_path / "new", backbone)
    assert len(renamed) == len(bank[0].tensors)
    assert all(before == old_key(after, wrapper=wrapper) for before, after in renamed)

    migrated = Expert.load("task-0", tmp_path / "new")
    assert migrated.config.target_modules == bank[0].config.target_modules
    with torch.no_grad():
        expected = bank(IMAGES, torch.zeros(4, dtype=int))
    assert not torch.equal(expected, backbone(IMAGES))
    assert torch.equal(features(copy.deepcopy(backbone), migrated), expected)


def test_only_a_wrapper_is_dropped_from_todays_names(fresh_backbone):
    expert = trained(fresh_backbone)[0]
    renamed = rename_old_keys(as_trained_before(expert, "vit.", {"": ""}), fresh_backbone)
    assert list(renamed.tensors) == list(expert.tensors)
    assert renamed.config.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("model_class, config_class", [(DeiTModel, DeiTConfig), (Dinov2Model, Dinov2Config)])
def test_other_architectures_have_their_own_old_names(backbone, model_class, config_class):
    size = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    other = Backbone(model_class(config_class(**size)), backbone.processor, backbone.config)
    bank = trained(other)
    names = {k: v for k, v in OLD_NAMES.items() if model_class is DeiTModel or k.startswith("attention")}
    old = as_trained_before(bank[0], f"{other.model.base_model_prefix}.", names, target_modules={"query", "value"})
    with torch.no_grad():
        expected = bank(IMAGES, torch.zeros(4, dtype=int))
    assert torch.equal(features(copy.deepcopy(other), rename_old_keys(old, other)), expected)


def test_an_expert_without_old_names_stays_the_same_object(fresh_backbone):
    expert = trained(fresh_backbone)[0]
    assert rename_old_keys(expert, fresh_backbone) is expert
    prompt = Expert("prompt", PromptTuningConfig(num_virtual_tokens=1), {"prompt_embeddings": torch.ones(1, 128)})
    assert rename_old_keys(prompt, fresh_backbone) is prompt


def test_the_original_is_not_changed(fresh_backbone):
    old = as_trained_before(trained(fresh_backbone)[0], target_modules={"query", "value"})
    before = old.config.to_dict()
    assert rename_old_keys(old, fresh_backbone).config.to_dict() != before
    assert old.config.to_dict() == before


def test_two_tensors_for_one_place_are_an_error(fresh_backbone):
    expert = trained(fresh_backbone)[0]
    both = replace(expert, tensors=expert.tensors | as_trained_before(expert).tensors)
    with pytest.raises(ExpertError, match="two tensors for base_model.model.layers.0"):
        rename_old_keys(both, fresh_backbone)


def test_the_configuration_of_an_early_peft_is_read(fresh_backbone, backbone, tmp_path):
    bank = trained(fresh_backbone, lora_alpha=16)
    as_trained_before(bank[0], "vit.").save(tmp_path / "old")
    config = {  # as PEFT 0.3 wrote it
        "base_model_name_or_path": "google/vit-base-patch16-224-in21k",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "merge_weights": False,
        "modules_to_save": ["classifier"],
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["query", "value"],
        "task_type": None,
    }
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    migrate_adapter(tmp_path / "old", tmp_path / "new", backbone)
    with torch.no_grad():
        expected = bank(IMAGES, torch.zeros(4, dtype=int))
    assert torch.equal(features(copy.deepcopy(backbone), Expert.load("task-0", tmp_path / "new")), expected)


def add_classifier(tensors):
    tensors["base_model.model.classifier.weight"] = torch.ones(2, 64)


def lose_a_layer(tensors):
    for key in [key for key in tensors if re.search(r"\.1\.", key)]:
        del tensors[key]


def add_an_unknown_layer(tensors):
    tensors["base_model.model.vit.encoder.layer.99.attention.attention.query.lora_A.weight"] = torch.ones(2, 64)


@pytest.mark.parametrize("change", [add_classifier, lose_a_layer, add_an_unknown_layer])
def test_an_adapter_that_would_be_used_in_part_is_refused(fresh_backbone, backbone, tmp_path, change):
    as_trained_before(trained(fresh_backbone)[0], "vit.", target_modules={"query", "value"}).save(tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "adapter_model.safetensors")
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(ExpertError, match="does not fit the backbone"):
        migrate_adapter(tmp_path / "old", tmp_path / "new", backbone)
    assert not (tmp_path / "new").exists()
    assert [name for name, _ in backbone.named_modules()] == names  # nothing is left on it
    with pytest.raises(ExpertError, match="does not fit"):
        features(fresh_backbone, rename_old_keys(Expert.load("task-0", tmp_path / "old"), fresh_backbone))


def test_an_adapter_for_another_architecture_is_refused(backbone, tmp_path):
    tensors = {"base_model.model.h.0.attn.c_attn.lora_A.weight": torch.ones(1, 4)}
    Expert("gpt", LoraConfig(target_modules=["c_attn"]), tensors).save(tmp_path / "gpt")
    with pytest.raises(ExpertError, match="does not fit the backbone"):
        migrate_adapter(tmp_path / "gpt", tmp_path / "new", backbone)


def test_an_adapter_is_not_migrated_in_place(fresh_backbone, tmp_path):
    with pytest.raises(ExpertError, match="in place"):
        migrate_adapter(tmp_path, tmp_path / "." / "", fresh_backbone)
