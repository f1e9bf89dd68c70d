"""Where in a picture an answer comes from: gradient times input, averaged over noisy copies (arXiv 1706.03825)."""

import base64
import io

import numpy as np
import PIL.Image
import torch

from ..model import ContinualModel


CELLS = 16  # along each side of the heat map
COPIES, NOISE = 8, 0.1  # noise as a share of the range of values
SHOWN = 320  # pixels
EVEN = 0.16  # share of one of nine parts, below which none stands out
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def saliency(model: ContinualModel, image: PIL.Image.Image) -> np.ndarray:
    """How much each part of a picture counts for the likeliest class, read by the chosen expert.

    It needs gradients alone, so it works with every method and backbone. If the class has nothing to be told apart
    from, as in a task of one class, it is what counts for the route.

    Args:
        model ([`ContinualModel`]): The model.
        image (`PIL.Image.Image`): The picture.

    Returns:
        Array of shape `(16, 16)`, whose sum is 1; all alike if nothing counts.

    Example:

    ```py
    >>> from PIL import Image
    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.demo.saliency import saliency

    >>> model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    >>> saliency(model, Image.new("RGB", (32, 32))).shape
    (16, 16)

    ```
    """
    transform, method = model.backbone.transform, model.method
    pixels = transform.normalize(torch.from_numpy(transform.resize([image])).to(model.device)).detach()
    noise = torch.randn(COPIES, *pixels.shape[1:], generator=torch.Generator().manual_seed(0)).to(pixels)
    noise[0] = 0
    copies = (pixels + NOISE * (pixels.max() - pixels.min()) * noise).requires_grad_()
    with torch.enable_grad(), method.bank.reading():
        output = method(copies)
        assert output.logits is not None
        label = int(output.logits[0].argmax())
        gradient = _gradient(output.logits.log_softmax(dim=1)[:, label], copies)
        if not gradient.any() and output.distances is not None:
            gradient = _gradient(-output.distances.amin(dim=1), copies)
    counts = (gradient * (copies - copies.mean(dim=(2, 3), keepdim=True))).detach().sum(dim=1).abs().mean(dim=0)
    found = torch.nn.functional.adaptive_avg_pool2d(counts[None], CELLS)[0].double().cpu().numpy()
    return found / found.sum() if found.sum() > 0 else np.full_like(found, 1 / found.size)


def _gradient(scores: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    if not scores.requires_grad:
        return torch.zeros_like(pixels)
    (found,) = torch.autograd.grad(scores.sum(), pixels, retain_graph=True, allow_unused=True)
    return torch.zeros_like(pixels) if found is None else found.nan_to_num()


def words(heat: np.ndarray) -> str:
    """A heat map in words: which of nine parts of the picture counts most.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.demo.saliency import words

    >>> words(np.eye(16)[0][:, None] * np.eye(16)[0] + 1e-3)
    'The top left of the picture counts most (82 %).'

    ```
    """
    parts = [[part.sum() for part in np.array_split(row, 3, axis=1)] for row in np.array_split(heat, 3, axis=0)]
    row, column = np.unravel_index(int(np.argmax(parts)), (3, 3))
    share = parts[row][column] / np.sum(parts)
    if share < EVEN:
        return "No part of the picture counts much more than the others."
    where = f"{ROWS[row]} {COLUMNS[column]}" if (row, column) != (1, 1) else "centre"
    return f"The {where} of the picture counts most ({100 * share:.0f} %)."


def overlay(image: PIL.Image.Image, heat: np.ndarray) -> str:
    """A picture with a heat map over it, as HTML with a text for those who cannot see it."""
    shown = image.convert("L").convert("RGB")
    shown = shown.resize((SHOWN, max(1, round(SHOWN * image.height / image.width))))
    strength = (heat / max(float(np.quantile(heat, 0.99)), 1e-12)).clip(0, 1)
    mask = PIL.Image.fromarray((200 * strength).astype(np.uint8)).resize(shown.size, PIL.Image.Resampling.BICUBIC)
    shown.paste(PIL.Image.new("RGB", shown.size, (239, 68, 68)), mask=mask)
    jpeg = io.BytesIO()
    shown.save(jpeg, "JPEG", quality=85)
    address = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    said = words(heat)
    return f'<figure><img src="{address}" alt="Heat map. {said}"><figcaption>{said}</figcaption></figure>'
