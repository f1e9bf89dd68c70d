"""What `docs/backbones.md` says of each family is true: LoRA, prompts, other sizes work or are refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image

from hf_clpeft import ContinualModel, ExpertBank, HfClpeftError, load_backbone, s_lora
from hf_clpeft.backbones.processors import set_size
from hf_clpeft.experts.expert import make_peft_config, make_peft_model


TABLE = Path(__file__).parent.parent / "docs" / "backbones.md"
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
DINO, VIT = VIT | {"mlp_ratio": 2}, VIT | {"intermediate_size": 32}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
TOWERS = {"text_config": TEXT, "vision_config": VIT}
NAFLEX = {"text_config": TEXT, "vision_config": {k: VIT[k] for k in VIT if k != "image_size"} | {"num_patches": 16}}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
DECODER |= {"decoder_intermediate_size": 16}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
HIERA = {"embed_dim": 8, "image_size": [32, 32], "patch_stride": [4, 4], "patch_size": [7, 7], "patch_padding": [3, 3]}
HIERA |= {"depths": [1, 1], "num_heads": [1, 2], "masked_unit_size": [4, 4], "query_stride": [2, 2]}
PVT = STAGES | {"image_size": 64, "num_attention_heads": [1, 1, 2, 2]}
MOBILE = {"image_size": 64, "num_attention_heads": 2, "initializer_range": 0.4, "hidden_sizes": [8, 12, 16]}
MOBILE |= {"neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 24]}
LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
RESNET = STAGES | {"embedding_size": 8, "layer_type": "basic"}
RELATIVE = VIT | {"use_relative_position_bias": True}

# By the name in the table: model, configuration, image processor, size of pictures and another one.
FAMILIES = {
    "ViT": (t.ViTModel, t.ViTConfig, VIT, "ViT", 32, 48),
    "ViT for grey pictures": (t.ViTModel, t.ViTConfig, VIT | {"num_channels": 1}, "ViT", 32, 48),
    "DeiT": (t.DeiTModel, t.DeiTConfig, VIT, "DeiT", 32, 48),
    "DINOv2": (t.Dinov2Model, t.Dinov2Config, DINO | {"image_size": 48}, "Bit", 32, 64),
    "DINOv2 with registers": (t.Dinov2WithRegistersModel, t.Dinov2WithRegistersConfig, DINO, "Bit", 32, 48),
    "DINOv3 ViT": (t.DINOv3ViTModel, t.DINOv3ViTConfig, VIT | {"num_register_tokens": 4}, "DINOv3ViT", 32, 48),
    "DINOv3 ConvNeXt": (t.DINOv3ConvNextModel, t.DINOv3ConvNextConfig, STAGES, "DINOv3ViT", 64, 96),
    "CLIP": (t.CLIPModel, t.CLIPConfig, TOWERS, "CLIP", 32, 48),
    "CLIP, vision tower alone": (t.CLIPVisionModel, t.CLIPVisionConfig, VIT, "CLIP", 32, 48),
    "SigLIP": (t.SiglipModel, t.SiglipConfig, TOWERS, "Siglip", 32, 48),
    "SigLIP, vision tower alone": (t.SiglipVisionModel, t.SiglipVisionConfig, VIT, "Siglip", 32, 48),
    "SigLIP 2 NaFlex": (t.Siglip2Model, t.Siglip2Config, NAFLEX, "Siglip", 32, 48),
    "BEiT": (t.BeitModel, t.BeitConfig, RELATIVE, "Beit", 32, 48),
    "data2vec vision": (t.Data2VecVisionModel, t.Data2VecVisionConfig, RELATIVE, "Beit", 32, 48),
    "ViT-MAE": (t.ViTMAEForPreTraining, t.ViTMAEConfig, VIT | DECODER, "ViT", 32, 48),
    "ViT-MSN": (t.ViTMSNModel, t.ViTMSNConfig, VIT, "ViT", 32, 48),
    "I-JEPA": (t.IJepaModel, t.IJepaConfig, VIT, "ViT", 32, 48),
    "Swin": (t.SwinModel, t.SwinConfig, SWIN, "ViT", 32, 48),
    "Swin V2": (t.Swinv2Model, t.Swinv2Config, SWIN, "ViT", 32, 48),
    "Hiera": (t.HieraModel, t.HieraConfig, HIERA | {"num_query_pool": 1}, "Bit", 32, 64),
    "MobileViT": (t.MobileViTModel, t.MobileViTConfig, MOBILE, "MobileViT", 64, 96),
    "PVT": (t.PvtModel, t.PvtConfig, PVT | {"num_encoder_blocks": 4}, "Pvt", 64, 96),
    "PVT v2": (t.PvtV2Model, t.PvtV2Config, PVT, "Pvt", 64, 96),
    "LeViT": (t.LevitModel, t.LevitConfig, LEVIT | {"key_dim": [8, 8, 8]}, "Levit", 64, 96),
    "ConvNeXt": (t.ConvNextModel, t.ConvNextConfig, STAGES, "ConvNext", 64, 96),
    "ConvNeXt V2": (t.ConvNextV2Model, t.ConvNextV2Config, STAGES, "ConvNext", 64, 96),
    "ResNet": (
        t.ResNetModel,
        t.ResNetConfig,
        RESNET,
        "ConvNext",
        64,
        96,
    ),
}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
LORA = {"peft_type": "LORA", "r": 2}


def told(columns=slice(2, 5)):
    """The table's rows: name of the family, and what it says of LoRA, prompts and other sizes."""
    rows = [line.strip("|").split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return {row[0].strip(): tuple(cell.strip() for cell in row[columns]) for row in rows[2:]}


def save(name, folder):
    """A checkpoint of that family with random weights."""
    model_class, config_class, values, kind, size, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**values))
    with torch.no_grad():  # zeros, as some are made of, would hide what is wrong
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if kind == "DINOv3ViT":  # which exists with torchvision alone
        values = {"image_processor_type": f"{kind}ImageProcessorFast", "size": {"height": size, "width": size}}
        return (folder / "preprocessor_config.json").write_text(json.dumps(values | {"resample": 2}))
    processor = getattr(t, f"{kind}ImageProcessorPil")()
    set_size(processor, size)
    processor.save_pretrained(folder)


def pictures():
    rng = np.random.default_rng(0)
    shapes = ((70, 50), (50, 80), (64, 64))
    return [Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def attempt(work):
    """What the table should say: `yes` if it works, `no` if it is refused in words of ours. Anything else fails."""
    try:
        work()
    except HfClpeftError as error:
        assert "\n" not in str(error) and len(str(error)) > 40
        return "no"
    return "yes"


def check_like_peft(backbone, arguments, layers=None):
    """Every picture under its own expert is what PEFT makes of it with that adapter alone."""
    pixels = torch.randn(3, *backbone.input_shape, generator=torch.Generator().manual_seed(0))
    alone = make_peft_model(copy.deepcopy(backbone), config := make_peft_config(arguments, backbone, layers))
    bank = ExpertBank(backbone)
    for name in ("one", "two"):
        for parameter in bank.start(name, config).parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
        bank.finish(name)
    with torch.no_grad(), bank.sharing() as trunk:
        frozen, mixed = bank.frozen(pixels), bank(pixels, torch.tensor([1, 0, 1]))
        assert trunk.depth == (layers[0] - 1 if layers else 0)
        for number, rows in enumerate(([1], [0, 2])):
            bank[number].copy_to(alone)
            wanted = backbone.pool(alone(pixel_values=pixels).last_hidden_state)
            torch.testing.assert_close(mixed[rows], wanted[rows], atol=1e-5, rtol=1e-4)
    assert mixed.shape == frozen.shape == (3, backbone.hidden_size) and not torch.allclose(mixed, frozen, atol=1e-5)


def check_saved(folder, name, image_size=None):
    """Features are finite and the same in every pass, and those of the saved model are the same to the bit."""
    model = ContinualModel.from_backbone(str(folder / name), s_lora(), image_size=image_size)
    features = model.backbone.features(pictures())
    assert np.isfinite(features).all() and not np.array_equal(features[0], features[1])
    assert np.array_equal(features, model.backbone.features(pictures()))
    model.save_pretrained(folder / "saved")
    again = ContinualModel.from_pretrained(folder / "saved")
    assert np.array_equal(features, again.backbone.features(pictures()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_tells_the_truth(name, tmp_path):
    save(name, tmp_path / name)
    if attempt(lambda: check_saved(tmp_path, name)) == "no":
        found = ("no", "no", "no")
    else:
        found = (
            attempt(lambda: check_like_peft(load_backbone(str(tmp_path / name)), LORA)),
            attempt(lambda: check_like_peft(load_backbone(str(tmp_path / name)), PROMPT)),
            attempt(lambda: check_saved(tmp_path, name, FAMILIES[name][5])),
        )
    assert found == told()[name]


@pytest.mark.parametrize("name", [name for name, (lora, *_) in told().items() if lora == "yes" and name != "timm"])
def test_the_table_tells_which_families_have_experts_in_upper_layers(name, tmp_path):
    save(name, tmp_path)
    found = attempt(lambda: check_like_peft(load_backbone(str(tmp_path)), LORA, layers=[2]))
    assert found == told(slice(6, 7))[name][0]


def test_the_table_has_every_family_that_is_tried():
    assert set(told()) - {"timm"} == set(FAMILIES)
