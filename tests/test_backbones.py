"""Loading a frozen backbone whole, at another size, in another precision."""

import copy

import pytest
import torch
from conftest import BACKBONE
from transformers import (
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from hf_clpeft import BackboneError, ConfigError, ContinualModel, ExpertBank, l2l, load_backbone, s_lora
from hf_clpeft.backbones import hash_weights
from hf_clpeft.experts.expert import make_peft_config, make_peft_model
from hf_clpeft.methods.method import Batch


@pytest.fixture
def local(backbone, tmp_path):
    """A writable copy of the bundled backbone."""
    folder = tmp_path / "vit"
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return folder


def test_the_backbone_is_frozen_and_stays_in_evaluation_mode(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.train().training


def test_another_image_size_interpolates_positions_once_as_transformers_does_each_time(backbone):
    larger = load_backbone(BACKBONE, image_size=48)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = backbone.model(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(larger(images), expected)
    assert larger.config.image_size == 48 and larger.processor.size["height"] == 48


def test_an_image_size_that_cuts_patches_is_refused_with_the_nearest(backbone):
    with pytest.raises(BackboneError, match="not a multiple of the patch size 8; try 40"):
        load_backbone(BACKBONE, image_size=42)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_changes_features_little_and_the_hash_not_at_all(backbone, dtype):
    half = load_backbone(BACKBONE, dtype=dtype)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert half.config.weight_hash == backbone.config.weight_hash
    similarity = torch.cosine_similarity(half(images).float(), backbone(images))
    assert similarity.min() > 0.99


def test_attention_can_be_computed_in_another_way_with_the_same_features(backbone):
    eager = load_backbone(BACKBONE, attn_implementation="eager")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert eager.model.config._attn_implementation == "eager" != backbone.model.config._attn_implementation
    torch.testing.assert_close(eager(images), backbone(images))


def test_the_hash_follows_weights_and_not_their_names(backbone):
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    renamed = torch.nn.ModuleDict({"b": layers[1], "a": layers[0]})
    before = hash_weights(layers)
    assert hash_weights(renamed) == before
    layers[0].weight.data[0, 0] += 1e-3
    assert hash_weights(layers) != before


def test_the_hash_is_that_of_a_saved_copy(backbone, local):
    assert load_backbone(str(local)).config.weight_hash == backbone.config.weight_hash


def test_a_checkpoint_with_missing_weights_is_refused(local):
    from safetensors.torch import load_file, save_file

    tensors = load_file(local / "model.safetensors")
    name = next(name for name in tensors if "layernorm" in name)
    del tensors[name]
    save_file(tensors, local / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="no matching weights for 1 tensors"):
        load_backbone(str(local))


@pytest.mark.parametrize(
    "model, names",
    [
        (ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)), ["q_proj", "v_proj"]),
        (Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)), None),
    ],
)
def test_query_and_value_projections_are_found_in_the_model(backbone, model, names):
    from hf_clpeft import Backbone

    found = Backbone(model, backbone.processor, backbone.config).find_query_value()
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert found == names if names else set(found) <= linear and len(found) == 2


@pytest.fixture(params=["convnext", "resnet"])
def convnet(request, tmp_path):
    """Folder of a ConvNet with random weights."""
    shape = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    torch.manual_seed(0)
    if request.param == "convnext":
        model = ConvNextModel(ConvNextConfig(**shape))
    else:
        model = ResNetModel(ResNetConfig(embedding_size=8, layer_type="basic", **shape))
    model.save_pretrained(tmp_path / "convnet")
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(tmp_path / "convnet")
    return str(tmp_path / "convnet")


def test_a_convnet_gives_means_and_its_experts_those_of_peft(convnet):
    backbone = load_backbone(convnet, image_size=64)
    pixel_values = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = backbone.model(pixel_values).last_hidden_state
        torch.testing.assert_close(backbone(pixel_values), outputs.mean(dim=(2, 3)))
    bank, config = ExpertBank(copy.deepcopy(backbone)), make_peft_config({"peft_type": "LORA", "r": 2}, backbone)
    experts = []
    for name in ("one", "two"):
        for parameter in bank.start(name, config).parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
        experts.append(bank.finish(name))
    alone = make_peft_model(backbone, config)
    with torch.no_grad():
        mixed = bank(pixel_values, torch.tensor([1, 0, 0, 1]))
        for position, expert in enumerate(experts):
            expert.copy_to(alone)
            wanted = backbone.pool(alone(pixel_values=pixel_values).last_hidden_state)
            rows = [1, 2] if position == 0 else [0, 3]
            torch.testing.assert_close(mixed[rows], wanted[rows], atol=1e-5, rtol=1e-5)


def test_training_leaves_the_statistics_of_a_convnet_as_they_are(convnet):
    model = ContinualModel.from_backbone(convnet, s_lora(r=2))
    before, pixel_values = hash_weights(model.backbone.model), torch.randn(4, 3, 32, 32)
    model.start_task("task-000", ["cat", "dog"])
    model.train()
    slot = model.bank.slot
    trained = [parameter for parameter in slot.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.method.loss(Batch(pixel_values, torch.tensor([0, 1, 0, 1]))).mean().backward()
    features = slot.peft_model(pixel_values=pixel_values).last_hidden_state.mean(dim=(2, 3))
    assert trained and hash_weights(model.backbone.model) == before
    model.finish_task(lambda query: (query(pixel_values), torch.tensor([0, 1, 0, 1])), num_train_images=4)
    torch.testing.assert_close(model.bank(pixel_values, torch.zeros(4, dtype=int)), features, atol=1e-5, rtol=1e-5)


def test_a_prompt_has_no_place_in_a_convnet(convnet):
    backbone = load_backbone(convnet)
    with pytest.raises(BackboneError, match="does not support prompts: it outputs a feature map, as a ConvNet does"):
        make_peft_model(backbone, make_peft_config({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, backbone))


def test_a_pool_has_no_place_in_a_convnet(convnet):
    model = ContinualModel.from_backbone(convnet, l2l(pool_size=2, top_n=1))
    with pytest.raises(ConfigError, match="A pool runs fused, which needs prompts or LoRA on linear layers"):
        model.start_task("task-000", ["cat", "dog"])


def test_features_of_several_depths_come_from_one_pass(backbone):
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    passes = []
    hook = backbone.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        both = backbone(pixel_values, [5, 6])
        assert len(passes) == 1
        last = torch.nn.functional.normalize(backbone(pixel_values), dim=-1)
        alone = backbone(pixel_values, [5])
    hook.remove()
    torch.testing.assert_close(both[:, 128:], last)
    assert both.shape == (2, 256) and alone.shape == (2, 128)
    torch.testing.assert_close(both.norm(dim=1), torch.full((2,), 2**0.5))


def test_a_model_without_known_projections_lists_its_layers(backbone):
    from hf_clpeft import Backbone

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(BackboneError, match=r"its layers are named \['0'\]"):
        Backbone(model, backbone.processor, backbone.config).find_query_value()
