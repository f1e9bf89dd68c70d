"""Backbones and models bundled with the package, which need no download."""

from importlib.resources import files
from pathlib import Path


ASSETS = Path(str(files("hf_clpeft"))) / "assets"
BUNDLED_BACKBONES = {"hf-clpeft/vit-tiny-glyphs": "vit-tiny-glyphs"}
DIGITS_MODEL = "hf-clpeft/s-lora-digits"
_DIGITS_METHODS = ("s-lora", "s-lora-pp", "s-prompts", "s-prompts-pp", "l2l", "l2p", "s-lora-mix")
BUNDLED_MODELS = {f"hf-clpeft/{method}-digits": f"{method}-digits" for method in _DIGITS_METHODS}
"""Repo ids and their folders in `assets`."""


def bundled_folder(name: str) -> Path | None:
    """Folder of a bundled backbone or model; `None` for any other name.

    Example:

    ```py
    >>> from hf_clpeft.backbones.bundled import bundled_folder

    >>> bundled_folder("hf-clpeft/s-lora-digits").name
    's-lora-digits'

    ```
    """
    folder = (BUNDLED_BACKBONES | BUNDLED_MODELS).get(name)
    return None if folder is None else ASSETS / folder
