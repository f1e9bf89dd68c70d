"""What to call models that are put together, so that every task's name says where it comes from."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..config.checks import LONGEST_NAME
from ..config.repos import split_revision


def label_sources(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Short labels that tell sources apart, and the same as the beginnings of names.

    A folder is called by the last part of its path, and by more of it where two folders end alike; a repo by its id,
    and with its revision where that makes the difference. What is still alike is numbered.

    Args:
        sources (sequence of `str`): Folders, repo ids with or without `@revision`, or other words.

    Returns:
        Two `list[str]`: Labels as people write them; and made of ASCII letters, digits and `-` alone, no two alike.

    Example:

    ```py
    >>> from hf_clpeft.hub.labels import label_sources

    >>> label_sources(["me/vit@task-001", "me/vit@task-002", "you/modèle"])
    (['me/vit@task-001', 'me/vit@task-002', 'you/modèle'], ['me-vit-task-001', 'me-vit-task-002', 'you-modele'])

    ```
    """
    choices = [_choices(source) for source in sources]
    chosen = [0] * len(choices)
    while True:
        labels = [choices[i][number] for i, number in enumerate(chosen)]
        names = [_name(label) or f"model-{i + 1}" for i, label in enumerate(labels)]
        longer = [
            i for i, number in enumerate(chosen) if number + 1 < len(choices[i]) and _is_alike(i, names, choices)
        ]
        if not longer:
            break
        for i in longer:
            chosen[i] += 1
    labels = [label if Path(source).is_dir() else source for label, source in zip(labels, sources, strict=True)]
    return labels, _number(names)


def join_name(prefix: str, name: str) -> str:
    """A task's name behind its model's; a hash stands for the middle of what is too long for a name.

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


def _choices(source: str) -> list[str]:
    """Labels of a source, from short to long; of a folder, no longer than it was written: others will read them."""
    if Path(source).is_dir():
        written = [part for part in Path(source).parts if part not in ("..", Path(source).anchor)]
        parts = Path(source).resolve().parts
        return ["/".join(parts[-count:]) for count in range(1, max(1, len(written)) + 1)]
    name = split_revision(source)[0]
    return [name] if name == source else [name, source]


def _name(label: str) -> str:
    plain = unicodedata.normalize("NFKD", label)
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    return re.sub("[^A-Za-z0-9]+", "-", plain).strip("-")


def _is_alike(i: int, names: list[str], choices: list[list[str]]) -> bool:
    """Whether another source has the same name, and a longer label would tell them apart."""
    return any(
        name.casefold() == names[i].casefold() and _name(other[-1]).casefold() != _name(choices[i][-1]).casefold()
        for name, other in zip(names, choices, strict=True)
    )


def _number(names: list[str]) -> list[str]:
    folded = [name.casefold() for name in names]
    numbered: list[str] = []
    for i, name in enumerate(names):
        unique, count = name, folded[:i].count(name.casefold())
        while folded.count(name.casefold()) > 1 and unique.casefold() in {*folded, *map(str.casefold, numbered)}:
            count += 1
            unique = f"{name}-{count}"
        numbered.append(unique)
    return numbered
