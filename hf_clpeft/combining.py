"""Experts of several models in one model and one router."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .backbones.saved import load_saved_backbone
from .config.errors import ConfigError
from .config.model import ContinualConfig, TaskConfig
from .config.repos import split_revision
from .experts import Expert
from .hub.labels import join_name, label_sources
from .model import ContinualModel


# What must not differ, and where it stands in a configuration.
ALIKE: dict[str, Callable[[ContinualConfig], Any]] = {
    "backbone weights": lambda config: config.backbone.weight_hash,
    "image size": lambda config: config.backbone.image_size,
    "technique": lambda config: config.method.peft["peft_type"],
    "route_layer": lambda config: config.method.route_layer,
    "router": lambda config: config.method.router,
}


def combine(
    sources: Iterable[str | Path | ContinualModel], backbone: str | None = None, **options: Any
) -> ContinualModel:
    """Puts the experts of several models into one; every image finds its own among all of them.

    Nothing is trained: experts, what routers know and head rows stay. Classes are merged by name. Where two
    models with a shared head know the same class, the combined head judges every image by the rows of its own expert's
    task alone; otherwise heads stay as they were. Task names stay where no two are the same; else they get the name of
    their source in front, as much of it as tells sources apart: `a-out-task-000` and `b-out-task-000` of the folders
    `a/out` and `b/out`.

    Args:
        sources (iterable of `str`, `Path` or [`ContinualModel`]): Repo ids (`me/model@task-003` for a revision),
            folders or models; two or more, each with one expert per task.
        backbone (`str`, *optional*): Where the backbone is now, when not where it was.
        options: `dtype`, `token`, `cache_dir`, `local_files_only`; see [`ContinualModel.from_pretrained`].

    Returns:
        [`ContinualModel`]: Its tasks say which model they came from.

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
    tasks = _rename([model.config.tasks for model in models], labels, prefixes)
    classes = list(dict.fromkeys(name for group in tasks for task in group for name in task.classes))
    first = models[0].config
    licenses = {model.config.license for model in models}
    config = ContinualConfig(
        replace(first.method, head="shared" if _share_head(models) else "per_task"),
        first.backbone,
        tasks=[task for group in tasks for task in group],
        classes=classes,
        license=first.license if len(licenses) == 1 else "other",
    )
    processor = models[0].backbone.processor
    frozen = load_saved_backbone(first.backbone, processor, backbone, labels[0], **options)
    combined = ContinualModel(frozen, config)
    combined.bank.extend(
        Expert(task.name, expert.config, expert.tensors)
        for model, group in zip(models, tasks, strict=True)
        for task, expert in zip(group, model.bank, strict=True)
    )
    for model in models:
        numbers = [classes.index(label) for label in model.config.classes]
        combined.router.merge(model.router, numbers)
        heads = model.heads
        for weight, bias, old, alone in zip(heads.weights, heads.biases, heads.classes, heads.alone, strict=True):
            combined.heads.write(weight, bias, [numbers[number] for number in old], alone)
    return combined


def _open(source: str | Path | ContinualModel, backbone: str | None, options: dict) -> ContinualModel:
    if isinstance(source, ContinualModel):
        return source
    name, revision = split_revision(str(source))
    return ContinualModel.from_pretrained(name, backbone=backbone, revision=revision, **options)


def _origin(source: str | Path | ContinualModel) -> str:
    """Where a source is, or was; a model that was never loaded is called by its method."""
    return source.origin or source.config.method.name if isinstance(source, ContinualModel) else str(source)


def _check_alike(one: ContinualModel, two: ContinualModel, name: str, other_name: str) -> None:
    first, other = one.config, two.config
    if other.method.experts != "per_task":
        raise ConfigError(f"{other_name} is of the method {other.method.name}, whose experts belong to no task.")
    if other.method.query_with_first_expert:
        raise ConfigError(
            f"{other_name} ({other.method.name}) takes query features with its own first expert, which others do not."
        )
    if not other.tasks:
        raise ConfigError(f"{other_name} has learnt no task.")
    for what, value in ALIKE.items():
        if value(first) != value(other):
            raise ConfigError(
                f"{name} and {other_name} cannot be combined: their {what} differs, {value(first)!r} and "
                f"{value(other)!r}."
            )
    settings = one.backbone.transform.differs_from(two.backbone.transform)
    if settings:
        raise ConfigError(
            f"{name} and {other_name} cannot be combined: they were trained on pictures that were resized or "
            f"normalised in other ways; {', '.join(settings)} differ."
        )


def _share_head(models: list[ContinualModel]) -> bool:
    """Rows of a shared head are compared with each other, so there must be one per class."""
    classes = [label for model in models for label in model.config.classes]
    return all(model.heads.shared for model in models) and len(set(classes)) == len(classes)


def _rename(groups: list[list[TaskConfig]], labels: list[str], prefixes: list[str]) -> list[list[TaskConfig]]:
    names = [task.name.casefold() for group in groups for task in group]  # folders of some disks do not tell A from a
    unique = len(set(names)) == len(names)
    return [
        [
            replace(
                task,
                name=task.name if unique else join_name(prefix, task.name),
                source=task.source or label,
                state=None,  # of a model that this one is not
            )
            for task in group
        ]
        for group, label, prefix in zip(groups, labels, prefixes, strict=True)
    ]
