"""Combines the experts of several models into one model."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from .backbones.saved import load_saved_backbone
from .config.checks import LONGEST_NAME
from .config.errors import ConfigError
from .config.model import ContinualConfig, TaskConfig
from .config.repos import split_revision
from .model import ContinualModel
from .storage.pictures import of_tasks


SAME_LOOK = (
    " It decides how a picture to predict is looked at. Give the same --{0} when learning both; or, where it is too "
    "late for that, load them, set model.config.method.{0} to one value, and combine these."
)
WHAT_TO_DO = {
    "test_views": SAME_LOOK.format("test_views"),
    "view_kind": SAME_LOOK.format("view_kind"),
    "first task's expert": (
        " It takes the features of all tasks. Learn both with slda_pp(adapt=False), or go on with both from "
        "one model that has learnt the first task."
    ),
}


def combine(
    sources: Iterable[str | Path | ContinualModel], backbone: str | None = None, **options: Any
) -> ContinualModel:
    """Combines the experts, routers and heads of several models into one model, without training.

    Classes are merged by name. If two models with a shared head know the same class, the combined model has a head per
    task; otherwise the kind of head is kept. If task names collide, they are prefixed with the shortest unique name of
    their source: `a-out-task-000` and `b-out-task-000` for the folders `a/out` and `b/out`. If routers add sums up,
    tasks that several models have, as they went on from the same one, are taken once.

    Args:
        sources (iterable of `str`, `Path` or [`ContinualModel`]): Repo ids (`me/model@task-003` for a revision),
            folders or models; two or more, each with one expert per task.
        backbone (`str`, *optional*): Folder or repo id of the backbone, if it has moved.
        options: `dtype`, `token`, `cache_dir`, `local_files_only`; see [`ContinualModel.from_pretrained`].

    Returns:
        [`ContinualModel`]: Each task has its source in its configuration.

    Raises:
        [`ConfigError`]: The models differ in backbone, image size or technique, or have no expert per task.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, combine, s_lora
    >>> from hf_clpeft.streams import load_benchmark

    >>> stream = load_benchmark("digits", max_train_samples_per_task=32, max_test_samples_per_task=8)
    >>> for task in stream[:2]:
    ...     model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    ...     args = ContinualTrainingArguments(output_dir=task.name, num_train_epochs=1, disable_tqdm=True)
    ...     _ = ContinualTrainer(model, args).learn(task)
    >>> combine(["task-000", "task-001"]).config.classes
    ['0', '1', '2', '3']

    ```
    """
    sources = [sources] if isinstance(sources, str | Path | ContinualModel) else list(sources)
    if len(sources) < 2:
        raise ConfigError(f"Combining needs two models or more; got {len(sources)}.")
    labels, prefixes = label_sources([_origin(source) for source in sources])
    models = [_open(source, backbone, options) for source in sources]
    for label, model in zip(labels, models, strict=True):
        _check_alike(models[0], model, labels[0], label)
    groups = _rename([model.config.tasks for model in models], labels, prefixes)
    classes = list(dict.fromkeys(name for group in groups for task in group for name in task.classes))
    first, *others = models
    licenses = {model.config.license for model in models}
    config = ContinualConfig(
        copy(first.method.merged_options([other.method for other in others])),
        first.config.backbone,
        tasks=[task for group in groups for task in group],
        classes=classes,
        license=first.config.license if len(licenses) == 1 else "other",
    )
    frozen = load_saved_backbone(first.config.backbone, first.backbone.processor, backbone, labels[0], **options)
    combined = ContinualModel(frozen, config)
    for model, group in zip(models, groups, strict=True):
        numbers = [classes.index(label) for label in model.config.classes]
        combined.method.merge(model.method, numbers, [task.name for task in group])
        renamed = {old.name: new.name for old, new in zip(model.config.tasks, group, strict=True)}
        combined.pictures |= of_tasks(model.pictures, renamed)
    if combined.router is not None and combined.router.knows_classes:
        for name in _shared(models, groups):
            with suppress(ConfigError):  # what cannot be removed counts twice
                combined.remove(name)
        combined.config.removed.clear()
    return combined


def _shared(models: Sequence[ContinualModel], groups: list[list[TaskConfig]]) -> list[str]:
    """New names of the tasks that an earlier model has, too, as both went on from the same model."""
    known, names = set[str](), list[str]()
    for model, group in zip(models, groups, strict=True):
        states = [task.state for task in model.config.tasks]
        names += [task.name for task, state in zip(group, states, strict=True) if state in known]
        known |= {state for state in states if state is not None}
    return names


def _open(source: str | Path | ContinualModel, backbone: str | None, options: dict) -> ContinualModel:
    if isinstance(source, ContinualModel):
        return source
    name, revision = split_revision(str(source))
    return ContinualModel.from_pretrained(name, backbone=backbone, revision=revision, **options)


def _origin(source: str | Path | ContinualModel) -> str:
    """Folder or repo of a source; the name of its method if it was never saved."""
    return source.origin or source.config.method.name if isinstance(source, ContinualModel) else str(source)


def _check_alike(one: ContinualModel, two: ContinualModel, name: str, other_name: str) -> None:
    """Raises [`ConfigError`] unless two models have the same backbone, preprocessing and kind of expert."""
    first, other = _alike(one, name), _alike(two, other_name)
    if not two.config.tasks:
        raise ConfigError(f"{other_name} has learnt no task.")
    methods = [model.config.method.name for model in (one, two)]
    said = "" if methods[0] == methods[1] else f"they are models of {methods[0]} and {methods[1]}, and "
    for what in first | other:
        if first.get(what) != other.get(what):
            raise ConfigError(
                f"{name} and {other_name} cannot be combined: {said}their {what} differs, {_shown(first.get(what))} "
                f"and {_shown(other.get(what))}.{WHAT_TO_DO.get(what, '')}"
            )
    settings = one.backbone.transform.differs_from(two.backbone.transform)
    if settings:
        raise ConfigError(
            f"{name} and {other_name} cannot be combined: they were trained on pictures that were resized or "
            f"normalised in other ways; {', '.join(settings)} differ."
        )


def _shown(value: Any) -> str:
    """A value in a message; of a hash its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)


def _alike(model: ContinualModel, name: str) -> dict[str, Any]:
    """Properties that must be equal in models to combine: values by name."""
    backbone = model.config.backbone
    try:
        own = model.method.alike()
    except ConfigError as error:
        raise ConfigError(f"{name} {error}.") from error
    return {"backbone weights": backbone.weight_hash, "image size": backbone.image_size, **own}


def _rename(groups: list[list[TaskConfig]], labels: list[str], prefixes: list[str]) -> list[list[TaskConfig]]:
    names = [task.name.casefold() for group in groups for task in group]  # some file systems are case-insensitive
    unique = len(set(names)) == len(names)
    return [
        [
            replace(
                task,
                name=task.name if unique else join_name(prefix, task.name),
                source=task.source or label,
                state=None,  # as it identifies a state of the source
            )
            for task in group
        ]
        for group, label, prefix in zip(groups, labels, prefixes, strict=True)
    ]


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
    >>> from hf_clpeft.combining import label_sources

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
    >>> from hf_clpeft.combining import join_name

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
