"""scikit-learn's handwritten digits as an image data set: 1,797 scans of 8 x 8 pixels that need no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
"""

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image


DOMAINS = ("scanned", "inverted", "rotated", "textured")
SCAN = 8  # side of a scan in pixels
SIZE = 32  # side of the resized image in pixels


def load_digits_dataset(domains: bool = False, seed: int = 0) -> DatasetDict:
    """The digits as images of 32 x 32 pixels, in a stratified 80/20 split.

    Args:
        domains (`bool`, *optional*, defaults to `False`): Distribute the scans over four domains (column `domain`):
            as scanned, inverted, rotated by 90°, and on a textured background.
        seed (`int`, *optional*, defaults to 0): Seed of the split, the domains and the textures.

    Returns:
        `DatasetDict`: Splits `train` (1,437 rows) and `test` (360 rows) with `image`, `label` and optionally `domain`.

    Example:

    ```py
    >>> from hf_clpeft.streams.digits import load_digits_dataset

    >>> digits = load_digits_dataset()
    >>> digits["train"].num_rows, digits["test"][0]["image"].size
    (1437, (32, 32))

    ```
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    domain_of = rng.permutation(np.arange(len(scans)) % len(DOMAINS)) if domains else np.zeros(len(scans), dtype=int)
    images = []
    for scan, domain in zip(scans.reshape(-1, SCAN, SCAN), domain_of, strict=True):
        ink = enlarge((scan * (255 / 16)).astype(np.uint8))
        images.append(PIL.Image.fromarray(_RENDER[domain](np.asarray(ink), rng)).convert("RGB"))
    columns = {"image": images, "label": labels.tolist()}
    features = {"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])}
    if domains:
        columns["domain"] = domain_of.tolist()
        features["domain"] = ClassLabel(names=list(DOMAINS))
    train, test = train_test_split(
        np.arange(len(scans)), test_size=0.2, random_state=seed, stratify=labels * len(DOMAINS) + domain_of
    )
    dataset = Dataset.from_dict(columns, features=Features(features))
    return DatasetDict(train=dataset.select(np.sort(train)), test=dataset.select(np.sort(test)))


def enlarge(scan: np.ndarray) -> PIL.Image.Image:
    """Converts a scan to a larger image.

    Args:
        scan (`uint8` array of shape `(8, 8)`): Ink values from 0 to 255.

    Returns:
        `PIL.Image.Image`: 32 x 32 pixels of mode `"L"`, light ink on black.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.streams.digits import enlarge

    >>> enlarge(np.zeros((8, 8), dtype=np.uint8)).size
    (32, 32)

    ```
    """
    return PIL.Image.fromarray(scan).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)


def _on_texture(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the digit in white over a grey sine grating of random direction, frequency and phase."""
    angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(0.5, 1.2), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = 75 + 55 * np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    share = ink / 255
    return (share * 255 + (1 - share) * waves).astype(np.uint8)


_RENDER = (
    lambda ink, rng: ink,
    lambda ink, rng: 255 - ink,
    lambda ink, rng: np.rot90(ink).copy(),
    _on_texture,
)
