"""Pre-train a tiny ViT on rendered letters and symbols (no digits at all).

Letters and symbols of the fonts that ship with matplotlib are rendered once into a bank of signed distance fields.
Batches are then drawn, warped, thickened, scanned down to 8x8 and put on backgrounds with a few tensor operations, so
that the data costs next to nothing compared to the network. The network learns to name the character on its [CLS]
token with a cosine softmax; small auxiliary heads (polarity, background, quarter turn, an 8x8 sketch of the ink) keep
other properties of the picture in the feature. All heads are thrown away afterwards.

scikit-learn's handwritten digits are never trained on, they only measure the frozen features at the end.

Needs torch 2.9 or newer for its Muon optimizer. Repeat with (11 minutes on 2 CPU cores, rendering included):

    python recipes/pretrain_glyphs.py --output_dir hf_clpeft/assets/vit-tiny-glyphs

`--architecture` trains another kind of network the same way, to compare kinds of backbones.
"""

import math
import re
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, gaussian_filter
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    set_seed,
)

from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.training.parsing import OptionParser


# Computer Modern has its own encoding outside the ASCII letters, so only A-Z and a-z are taken from it.
FONTS = [r"DejaVu(Sans|SansMono|Serif)(-\w+)?", r"STIXGeneral(Bol|Italic|BolIta)?"]
FONTS += ["cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"]
SCRIPTS = r"(LATIN|GREEK|CYRILLIC|COPTIC|ARMENIAN|GEORGIAN|HEBREW|TIFINAGH|LAO|NKO|MATHEMATICAL) .*"
# Symbols that draw digits, and families of dots and lines that look alike once they are scaled to a box.
EXCLUDED = (
    r"DIGIT|NUMBER|LETTER TWO|TONE TWO|TONE FIVE|TONE SIX|CUBE ROOT|FOURTH ROOT|PLAYING CARD|SYMBOL FOR|PERCENT"
    r"|PER MILLE|PER TEN|BRAILLE|BOX DRAWINGS|HEXAGRAM|DOMINO|DIE FACE|MAHJONG|TETRAGRAM|BLOCK|QUADRANT|COMBINING"
)
MIN_STYLES, MERGE_ABOVE = 6, 0.93  # fewest fonts that draw a character, and the likeness that makes two of them one
HIDDEN = 128  # width of the feature
CONTENT, BANK = 36, 48  # a glyph's longer side, and the side of its picture in the bank
SDF_STEP = 1 / 16  # distances are stored as uint8 in steps of 1/16 pixel
# Matrix (32, 8) that resizes one axis from 8 to 32 pixels like Pillow's bicubic filter.
UPSCALE = F.interpolate(torch.eye(8)[None, None], size=(32, 8), mode="bicubic", antialias=True)[0, 0]


@dataclass
class GlyphArguments:
    """Arguments of the glyph pre-training."""

    output_dir: str = field(metadata={"help": "Folder for config, weights and image processor."})
    architecture: Literal["vit", "vit_small", "dinov2", "convnext"] = field(
        default="vit", metadata={"help": "6 layers; 3 with MLPs half as wide; blocks as in DINOv2; a ConvNet."}
    )
    steps: int = field(default=1500, metadata={"help": "Number of optimizer steps."})
    batch_size: int = field(default=128, metadata={"help": "Glyphs per step."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "Peak rate of Muon, for the layers' matrices."})
    adam_learning_rate: float = field(default=1e-2, metadata={"help": "Peak rate of AdamW, for everything else."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with rising learning rate."})
    ramp_ratio: float = field(default=0.4, metadata={"help": "Share of the steps with growing augmentation."})
    char_scale: float = field(default=18.0, metadata={"help": "Scale of the cosine softmax over characters."})
    aux_scale: float = field(default=6.0, metadata={"help": "Scale of the cosine softmax of the auxiliary losses."})
    aux_weight: float = field(default=0.3, metadata={"help": "Weight of each of the polarity/texture/turn losses."})
    sketch_weight: float = field(default=1.0, metadata={"help": "Weight of the 8x8 sketch loss."})
    eval_steps: int = field(default=500, metadata={"help": "Measure the frozen features every so many steps."})
    seed: int = field(default=0, metadata={"help": "Random seed."})

    def __post_init__(self):
        check_types(self)
        numbers = [f.name for f in fields(self) if f.name not in ("output_dir", "architecture")]
        check_ranges(self, **dict.fromkeys(numbers, (0, MOST)))
        check_ranges(self, **dict.fromkeys(("steps", "batch_size", "eval_steps"), (1, MOST)))
        check_ranges(self, warmup_ratio=(0, 1), ramp_ratio=(0.001, 1))


def wanted(code: int, ascii_only: bool) -> bool:
    """Whether code point `code` is a plain letter or symbol; anything that is or shows a digit is refused."""
    char = chr(code)
    if ascii_only:
        return char.isascii() and char.isalpha()
    category, name, parts = unicodedata.category(char), unicodedata.name(char, ""), unicodedata.decomposition(char)
    if category not in ("Lu", "Ll", "Lo", "Sm", "Sc", "So") or not name or re.search(EXCLUDED, name):
        return False
    if parts and not parts.startswith("<font>"):  # accents, circled letters, superscripts, ligatures, fractions ...
        return False
    return category[0] == "S" or bool(re.fullmatch(SCRIPTS, name))


def render(font: ImageFont.FreeTypeFont, char: str) -> np.ndarray | None:
    """Signed distance field of one character, float32 (BANK, BANK), positive inside; None if nothing is drawn."""
    image = Image.new("L", (768, 384))
    ImageDraw.Draw(image).text((192, 96), char, fill=255, font=font)
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = 2 * CONTENT / max(image.size)
    size = [max(2, round(side * scale)) for side in image.size]
    canvas = Image.new("L", (2 * BANK, 2 * BANK))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), (BANK - size[0] // 2, BANK - size[1] // 2))
    ink = np.asarray(canvas) > 127
    if not ink.any():
        return None
    distance = (distance_transform_edt(ink) - distance_transform_edt(~ink)) / 2
    return distance.reshape(BANK, 2, BANK, 2).mean((1, 3)).astype(np.float32)


def build_bank() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Render every wanted character of every font.

    Returns the distance fields, uint8 (glyphs, BANK, BANK); the class of each glyph, int64 (glyphs,); and the
    character that stands for each class. Characters whose shapes coincide (Latin A, Greek Alpha, Cyrillic A; c and C)
    share one class: each joins the first earlier character whose blurred picture has a cosine above the threshold.
    """
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fields, keys, shapes = [], [], {}
    paths = [path for name in FONTS for path in sorted(folder.glob("*.ttf")) if re.fullmatch(name, path.stem)]
    for path in paths:
        font, cmap = ImageFont.truetype(path, 96), TTFont(path).getBestCmap()
        digit_glyphs = {name for code, name in cmap.items() if unicodedata.category(chr(code))[0] == "N"}
        for code, name in sorted(cmap.items()):
            skip = name in digit_glyphs or not wanted(code, path.stem.startswith("cm"))
            distance = None if skip else render(font, chr(code))
            if distance is None:
                continue
            keys.append(unicodedata.normalize("NFKD", chr(code)))  # mathematical bold A is one more style of A
            fields.append(np.clip(distance / SDF_STEP + 128, 0, 255).astype(np.uint8))
            if keys[-1] not in shapes:
                shape = gaussian_filter((distance > 0).astype(np.float32), 1.5)[::2, ::2].ravel()
                shapes[keys[-1]] = shape / np.linalg.norm(shape)
    styles, leaders, class_of = Counter(keys), [], {}
    for key in [key for key in shapes if styles[key] >= MIN_STYLES]:
        similarity = [float(shapes[key] @ shapes[leader]) for leader in leaders]
        if similarity and max(similarity) > MERGE_ABOVE:
            class_of[key] = int(np.argmax(similarity))
        else:
            class_of[key] = len(leaders)
            leaders.append(key)
    kept = [index for index, key in enumerate(keys) if key in class_of]
    labels = torch.tensor([class_of[keys[index]] for index in kept])
    return torch.from_numpy(np.stack([fields[index] for index in kept])), labels, leaders


def augment(bank: torch.Tensor, half_width: torch.Tensor, strength: float) -> dict[str, torch.Tensor]:
    """Draw a batch of distance fields in new ways.

    Args:
        bank: uint8 (batch, BANK, BANK), distance fields.
        half_width: float (batch,), typical half stroke width of each glyph in bank pixels.
        strength: 0 (plain) to 1 (full augmentation).

    Returns `pixel_values` (batch, 3, 32, 32) in [-1, 1], `sketch` (batch, 64) the ink at 8x8, and the int64 labels
    `turn` (quarter turns, 0-3), `polarity` (1 if inverted) and `texture` (1 if on a textured background).
    """
    n, device, up = len(bank), bank.device, UPSCALE.to(bank.device)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, device=device) * (high - low) + low

    turn = torch.where(uniform(0, 1) < 0.3, torch.randint(1, 4, (n,), device=device), 0)
    polarity, texture = (uniform(0, 1) < 0.25).long(), (uniform(0, 1) < 0.25).long()

    # Where each of the 32x32 pixels looks in the bank: shift, perspective, elastic, rotation, scale, shear, stretch.
    axis = torch.linspace(-1, 1, 33, device=device)[:-1] + 1 / 32
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(n, 32, 32, 2)
    elastic = F.interpolate(torch.randn(n, 2, 4, 4, device=device), size=(32, 32), mode="bicubic").permute(0, 2, 3, 1)
    grid = grid + strength * (uniform(-0.12, 0.12, 1, 1, 2) + uniform(0, 0.13, 1, 1, 1) * elastic)
    grid = grid * (1 + strength * (grid * uniform(-0.12, 0.12, 1, 1, 2)).sum(-1, keepdim=True))
    scale, stretch = 0.95 * torch.exp(strength * uniform(-0.25, 0.1)), torch.exp(strength * uniform(-0.35, 0.35))
    angle = strength * uniform(-0.3, 0.3) + turn * math.pi / 2
    cos, sin, shear = torch.cos(angle), torch.sin(angle), strength * uniform(-0.4, 0.4)
    rotate = torch.stack([cos, sin, -sin, cos], -1).view(n, 2, 2)
    squeeze = torch.stack([stretch, shear, 0 * shear, 1 / stretch], -1).view(n, 2, 2)
    matrix = (squeeze @ rotate) * (CONTENT / BANK / scale)[:, None, None]
    grid = grid @ matrix[:, None].transpose(-1, -2)
    distance = (bank[:, None].float() - 128) * SDF_STEP
    distance = F.grid_sample(distance, grid, padding_mode="border", align_corners=False)[:, 0]

    # A distance field turns into strokes of any width by moving the threshold (distances in output pixels now).
    pixel = (scale * 32 / CONTENT)[:, None, None]
    half = half_width[:, None, None] * pixel
    change = (uniform(1.4, 3.2, 1, 1) - half).clamp(max=2.0).maximum(-0.4 * half) * (0.3 + 0.7 * strength)
    ink = torch.sigmoid((distance * pixel + change) * uniform(1.5, 6.0, 1, 1))
    small = F.avg_pool2d(ink[:, None], 4)[:, 0]
    scanned = (up @ ((small * 16).round() / 16 @ up.T).clamp(0, 1)).clamp(0, 1)
    ink = torch.where(uniform(0, 1, 1, 1) < 0.7, scanned, ink)

    # Background, contrast, polarity and a little noise.
    wave = (torch.stack([axis.repeat(32, 1), axis.repeat(32, 1).T], -1) * uniform(-16, 16, 1, 1, 2)).sum(-1)
    wave = 0.5 + 0.5 * torch.sin(wave + uniform(0, 6.3, 1, 1))
    size = int(torch.randint(2, 6, (1,)))
    noise = F.interpolate(torch.rand(n, 1, 2**size, 2**size, device=device), size=(32, 32), mode="bilinear")[:, 0]
    noise = (noise - 0.5) * 1.5 + 0.5
    mix = uniform(-0.5, 1.5, 1, 1).clamp(0, 1)
    ground = (mix * wave + (1 - mix) * noise).clamp(0, 1) * uniform(0.25, 0.6, 1, 1) * texture[:, None, None]
    image = ground + ink * (uniform(1 - 0.25 * strength, 1, 1, 1) - ground)
    image = image + 0.04 * strength * torch.randn(n, 32, 32, device=device) * (uniform(0, 1, 1, 1) < 0.3)
    image = torch.where(polarity[:, None, None] == 1, 1 - image, image).clamp(0, 1) * 2 - 1
    pixel_values = image[:, None].expand(n, 3, 32, 32).contiguous()
    labels = {"turn": turn, "polarity": polarity, "texture": texture}
    return {"pixel_values": pixel_values, "sketch": small.flatten(1), **labels}


def digit_images(domain: str = "scanned") -> torch.Tensor:
    """The 1797 digits as `pixel_values`, float (1797, 3, 32, 32): scanned, inverted, rotated or textured."""
    rng, images = np.random.default_rng(0), []
    rows, columns = np.mgrid[:32, :32]
    for digit in load_digits().images:
        image = Image.fromarray((digit * 255 / 16).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC)
        x = np.asarray(image, np.float32) / 255
        stripes = 0.25 + 0.15 * np.sin((rows + columns) * 0.8) + 0.1 * rng.standard_normal((32, 32))
        looks = {"inverted": 1 - x, "rotated": np.rot90(x), "textured": np.maximum(x, stripes.clip(0, 0.6))}
        images.append(torch.tensor(looks.get(domain, x).copy(), dtype=torch.float32) * 2 - 1)
    return torch.stack(images)[:, None].expand(-1, 3, 32, 32)


@torch.no_grad()
def evaluate(model: PreTrainedModel) -> dict[str, float]:
    """Measure the frozen [CLS] feature on the digits, a fifth of them held out.

    Returns the accuracy of a linear probe (`probe`); of sending each picture to the one of five tasks of two digits
    that owns the nearest k-means centre (`route_k...`); and of telling four looks of the digits apart (`domain_k5`).
    """
    device, domains, features = next(model.parameters()).device, ["scanned", "inverted", "rotated", "textured"], {}
    for domain in domains:
        chunks = digit_images(domain).split(256)
        features[domain] = torch.cat([feature_of(model, c.to(device)).cpu() for c in chunks]).numpy()
    target, x = load_digits().target, features["scanned"]
    train, test = train_test_split(np.arange(len(target)), test_size=0.2, stratify=target, random_state=0)
    probe = LogisticRegression(max_iter=5000).fit(x[train], target[train])
    metrics = {"probe": probe.score(x[test], target[test])}

    def route(groups: list[np.ndarray], queries: np.ndarray, truth: np.ndarray, k: int) -> float:
        centres = [KMeans(k, n_init=3, random_state=0).fit(group).cluster_centers_ for group in groups]
        nearest = np.stack([((queries[:, None] - c) ** 2).sum(-1).min(1) for c in centres], 1).argmin(1)
        return float((nearest == truth).mean())

    unit = {domain: x / np.linalg.norm(x, axis=1, keepdims=True) for domain, x in features.items()}
    tasks = [unit["scanned"][train][target[train] // 2 == task] for task in range(5)]
    for k in (5, 10, 20, 50):
        metrics[f"route_k{k}"] = route(tasks, unit["scanned"][test], target[test] // 2, k)
    queries, truth = np.concatenate([unit[d][test] for d in domains]), np.repeat(np.arange(4), len(test))
    metrics["domain_k5"] = route([unit[d][train] for d in domains], queries, truth, 5)
    return {name: round(float(value), 4) for name, value in metrics.items()}


def make_model(architecture: str) -> PreTrainedModel:
    """A small network for images of 32 x 32 pixels."""
    if architecture == "convnext":
        shape = {"hidden_sizes": [32, 64, 96, HIDDEN], "depths": [2, 2, 4, 2], "patch_size": 2}
        return ConvNextModel(ConvNextConfig(image_size=32, **shape))
    small = architecture == "vit_small"
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": HIDDEN, "num_attention_heads": 4}
    shape |= {"num_hidden_layers": 3 if small else 6, "layer_norm_eps": 1e-6, "initializer_range": 0.1}
    if architecture == "dinov2":
        return Dinov2Model(Dinov2Config(layerscale_value=0.1, **shape))
    config = ViTConfig(intermediate_size=(2 if small else 4) * HIDDEN, **shape)
    return ViTModel(config, add_pooling_layer=False)


def feature_of(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """[CLS], or the mean over all places of a ConvNet: of shape `(batch, HIDDEN)`."""
    outputs = model(pixel_values).last_hidden_state
    return outputs.mean(dim=(2, 3)) if outputs.dim() == 4 else outputs[:, 0]


def main() -> None:
    """Render the glyphs, train the ViT on them, measure it on the digits and save it."""
    (args,) = OptionParser((GlyphArguments,)).read()
    set_seed(args.seed)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.time()
    bank, labels, classes = build_bank()
    bank, labels = bank.to(device), labels.to(device)
    print(f"{len(bank)} glyphs of {len(classes)} classes rendered in {time.time() - start:.0f}s", flush=True)
    inside = ((bank.float() - 128) * SDF_STEP).clamp(min=0)
    half_width = 2 * inside.sum((1, 2)) / (inside > 0).sum((1, 2)).clamp(min=1)  # a stroke's mean depth is half of it
    sampling = torch.bincount(labels)[labels].float().rsqrt()  # a class with 4 times the glyphs is seen twice as often

    model = make_model(args.architecture).to(device)
    sizes = {"char": len(classes), "turn": 4, "polarity": 2, "texture": 2, "sketch": 64}
    heads = nn.ModuleDict({name: nn.Linear(HIDDEN, size) for name, size in sizes.items()}).to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layer" in name]
    others = [p for p in [*model.parameters(), *heads.parameters()] if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_learning_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=args.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    warmup = max(1, round(args.warmup_ratio * args.steps))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, step / args.steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    seen = []
    for step in range(1, args.steps + 1):
        strength = 0.2 + 0.8 * min(1.0, step / (args.ramp_ratio * args.steps))
        index = torch.multinomial(sampling, args.batch_size, replacement=True)
        batch = augment(bank[index], half_width[index], strength)
        feature = feature_of(model, batch["pixel_values"])
        upright = batch["turn"] == 0  # a turned character may be another one, so only upright ones are named
        cosine = {name: F.linear(F.normalize(feature), F.normalize(head.weight)) for name, head in heads.items()}
        logits = args.char_scale * cosine["char"][upright]
        char = labels[index][upright]
        loss = char_loss = F.cross_entropy(logits, char, label_smoothing=0.05)
        for name in ("turn", "polarity", "texture"):
            loss = loss + args.aux_weight * F.cross_entropy(args.aux_scale * cosine[name], batch[name])
        sketch_loss = F.mse_loss(heads["sketch"](feature), batch["sketch"]) / batch["sketch"].var()
        loss = loss + args.sketch_weight * sketch_loss
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        accuracy = (logits.argmax(1) == char).float().mean()
        seen.append([char_loss.item(), accuracy.item(), sketch_loss.item()])
        if step % 50 == 0:
            means = "char loss {:.3f} accuracy {:.3f} sketch loss {:.3f}".format(*np.mean(seen[-50:], 0))
            print(f"step {step}/{args.steps} {time.time() - start:.0f}s strength {strength:.2f} {means}", flush=True)
        if step % args.eval_steps == 0 or step == args.steps:
            print(f"step {step} digits: {evaluate(model)}", flush=True)
            half = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
            model.save_pretrained(args.output_dir, state_dict=half)  # fp16 on disk, the config keeps float32
            ViTImageProcessor(size={"height": 32, "width": 32}, resample=3).save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir} after {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
