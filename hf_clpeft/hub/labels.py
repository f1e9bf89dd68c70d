"""Short unique labels of the models that are combined, which become prefixes of their tasks' names."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..config.checks import LONGEST_NAME
from ..config.repos import split_revision


def label_sources(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Short unique labels of models, to display and as prefixes of names.

    A folder is labelled with the last part of its path, or more parts if two collide; a repo with its id, and with its
    revision if the ids collide. Remaining duplicates are numbered.

    Args:
        sources (sequence of `str`): Folders, repo ids with or without `@revision`, or other text.

    Returns:
        Two `list[str]`: labels to display; and unique prefixes of ASCII letters, digits and `-`.

    Example:

    ```py
    >>> from hf_clpeft.hub.labels import label_sources

    >>> label_sources(["me/vit@task-001", "me/vit@task-002", "you/modèle"])
    (['me/vit@task-001', 'me/vit@task-002', 'you/modèle'], ['me-vit-task-001', 'me-vit-task-002', 'you-modele'])

    ```
    """
    candidates = [_candidates(source) for source in sources]
    chosen = [0] * len(candidates)
    while True:
        labels = [candidates[i][number] for i, number in enumerate(chosen)]
        names = [_slug(label) or f"model-{i + 1}" for i, label in enumerate(labels)]
        longer = [
            i for i, number in enumerate(chosen) if number + 1 < len(candidates[i]) and _collides(i, names, candidates)
        ]
        if not longer:
            break
        for i in longer:
            chosen[i] += 1
    labels = [label if Path(source).is_dir() else source for label, source in zip(labels, sources, strict=True)]
    return labels, _make_unique(names)


def join_name(prefix: str, name: str) -> str:
    """Joins a prefix and a task's name; a hash replaces the middle of what would be too long.

    Example:

    ```py
    >>> from hf_clpeft.hub.labels import join_name

    >>> join_name("me-vit", "task-000")
    'me-vit-task-000'

    ```
    """
    joined = f"{prefix}-{name}"
    if len(joined) <= LONGEST_NAME:
        return joined
    digest = hashlib.sha256(joined.encode()).hexdigest()[:8]
    return f"{joined[: LONGEST_NAME // 2 - 10]}-{digest}-{joined[-LONGEST_NAME // 2 :]}"


def _candidates(source: str) -> list[str]:
    """Possible labels of a source, from short to long; a folder's show no more of its path than the user wrote."""
    if Path(source).is_dir():
        written = [part for part in Path(source).parts if part not in ("..", Path(source).anchor)]
        parts = Path(source).resolve().parts
        return ["/".join(parts[-count:]) for count in range(1, max(1, len(written)) + 1)]
    name = split_revision(source)[0]
    return [name] if name == source else [name, source]


def _slug(label: str) -> str:
    plain = unicodedata.normalize("NFKD", label)
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return re.sub("[^A-Za-z0-9]+", "-", plain).strip("-")


def _collides(i: int, names: list[str], candidates: list[list[str]]) -> bool:
    """Whether another source has the same slug, and a longer label would tell them apart."""
    return any(
        name.casefold() == names[i].casefold() and _slug(other[-1]).casefold() != _slug(candidates[i][-1]).casefold()
        for name, other in zip(names, candidates, strict=True)
    )


def _make_unique(names: list[str]) -> list[str]:
    folded = [name.casefold() for name in names]
    numbered: list[str] = []
    for i, name in enumerate(names):
        unique, count = name, folded[:i].count(name.casefold())
        while folded.count(name.casefold()) > 1 and unique.casefold() in {*folded, *map(str.casefold, numbered)}:
            count += 1
            unique = f"{name}-{count}"
        numbered.append(unique)
    return numbered
