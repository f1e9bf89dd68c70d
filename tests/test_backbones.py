"""Loading a frozen backbone whole, at another size, in another precision."""

import pytest
import torch
from conftest import BACKBONE
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_clpeft import BackboneError, load_backbone
from hf_clpeft.backbones import hash_weights


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
    with pytest.raises(BackboneError, match="no multiple of the patch size 8; try 40"):
        load_backbone(BACKBONE, image_size=42)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_changes_features_little_and_the_hash_not_at_all(backbone, dtype):
    half = load_backbone(BACKBONE, dtype=dtype)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert half.config.weight_hash == backbone.config.weight_hash
    similarity = torch.cosine_similarity(half(images).float(), backbone(images))
    assert similarity.min() > 0.99


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
    with pytest.raises(BackboneError, match="no fitting weights for 1 tensors"):
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


def test_a_model_without_known_projections_lists_its_layers(backbone):
    from hf_clpeft import Backbone

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(BackboneError, match=r"its linear layers are named \['0'\]"):
        Backbone(model, backbone.processor, backbone.config).find_query_value()
