"""Backbones and models bundled with the package, which need no download."""

from difflib import get_close_matches
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


def did_you_mean(name: str) -> str:
    """A question that ends a message about a model that is nowhere: a bundled one with a similar name, if any.

    Example:

    ```py
    >>> from hf_clpeft.backbones.bundled import did_you_mean

    >>> did_you_mean("s-lora-digits"), did_you_mean("me/birds")
    (' Did you mean hf-clpeft/s-lora-digits?', '')

    ```
    """
    stems = {model.partition("/")[2]: model for model in BUNDLED_MODELS}
    near = get_close_matches(name if "/" in name else f"hf-clpeft/{name}", BUNDLED_MODELS, n=1, cutoff=0.85)
    found = stems.get(name.rpartition("/")[2]) or next(iter(near), None)
    return f" Did you mean {found}?" if found else ""
