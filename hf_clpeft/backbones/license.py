"""The licence of a backbone, as its own card says."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..config.hub_errors import HfHubHTTPError
from .bundled import bundled_folder


CARD_NAME = "README.md"
LARGEST = 2**17  # characters of a card that are read
IDENTIFIER = re.compile(r"[\w.+-]{1,60}")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def license_of(backbone: str, revision: str | None = None, ask: bool = False) -> str | None:
    """The licence that the card of a backbone names; `None` if it is not at hand, or names none.

    Args:
        backbone (`str`): Repo id or folder.
        revision (`str`, *optional*): Commit of the repo.
        ask (`bool`, *optional*, defaults to `False`): Ask the Hub if the card is not in the cache.

    Example:

    ```py
    >>> from hf_clpeft.backbones.license import license_of

    >>> license_of("hf-clpeft/vit-tiny-glyphs")
    'apache-2.0'

    ```
    """
    folder = bundled_folder(backbone) or Path(backbone)
    path: Any = folder / CARD_NAME if folder.is_dir() else _on_the_hub(backbone, revision, ask)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            block = re.match(r"\s*---\s*\n(.*?)\n---", file.read(LARGEST), re.DOTALL)
        values = yaml.safe_load(block[1]) if block else None
    except (OSError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    named = values.get("license")
    names = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    if names == ["other"] and isinstance(values.get("license_name"), str):
        names = [values["license_name"]]
    return ", ".join(names) if names and all(map(IDENTIFIER.fullmatch, names)) else None


def _on_the_hub(repo_id: str, revision: str | None, ask: bool) -> str | None:
    """Path of the card in the cache of `huggingface_hub`, where it is put if the Hub may be asked and answers."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if REPO_ID.fullmatch(repo_id) is None:
        return None
    try:
        cached = try_to_load_from_cache(repo_id, CARD_NAME, revision=revision)
        if isinstance(cached, str):
            return cached
        return hf_hub_download(repo_id, CARD_NAME, revision=revision) if ask else None
    except (OSError, ValueError, HfHubHTTPError):  # offline, denied, or there is none
        return None
