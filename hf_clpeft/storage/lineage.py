"""Lineage of models: only a later state of the same model may overwrite a saved one."""

from ..config import ContinualConfig
from ..config.method import RESOLVED
from ..methods import METHODS


def difference(config: ContinualConfig, there: ContinualConfig) -> str | None:
    """Describes why a saved model is not an earlier state of another one.

    Args:
        config ([`ContinualConfig`]): The model to save.
        there ([`ContinualConfig`]): The model that it would overwrite.

    Returns:
        `str`, *optional*: Description of the saved model; `None` if it is an earlier state.

    Example:

    ```py
    >>> from hf_clpeft.config import BackboneConfig, ContinualConfig, TaskConfig
    >>> from hf_clpeft.storage.lineage import difference
    >>> from hf_clpeft.methods import s_lora

    >>> backbone, pets = BackboneConfig("vit", 224, "0f3c"), TaskConfig("task-000", ["cat", "dog"])
    >>> there = ContinualConfig(s_lora(), backbone, [pets], ["cat", "dog"])
    >>> difference(ContinualConfig(s_lora(), backbone), there)
    'one that has learnt task-000, which this one has not'

    ```
    """
    ours, theirs = config.backbone, there.backbone
    if (ours.weight_hash, ours.image_size) != (theirs.weight_hash, theirs.image_size):
        return f"one on the backbone {theirs.name_or_path} ({theirs.weight_hash[:12]}…, {theirs.image_size} px)"
    if config.method.name != there.method.name:
        return f"one of the method {there.method.name}"
    known = {task.name: task for task in config.tasks}
    gone = set(config.removed)
    forgotten = [task.name for task in there.tasks if task.name not in known and task.name not in gone]
    if forgotten:
        return f"one that has learnt {', '.join(forgotten[:3])}, which this one has not"
    method = METHODS.get(config.method.name)
    remade = tuple(f"experts/{name}/" for name in method.remade) if method is not None else ()
    lasting = ("sums/", "experts/") if method is not None and method.independent else ("sums/",)
    for path, digest in config.files.items():
        if path.startswith(lasting) and not path.startswith(remade) and there.files.get(path, digest) != digest:
            return f"one with another {path}"
    for task in there.tasks:
        own = known.get(task.name, task)
        if (own.classes, own.domain, own.source) != (task.classes, task.domain, task.source):
            return (
                f"one whose {task.name} has the classes {task.classes[:5]} (domain {task.domain}) from {task.source}"
            )
        if own.state != task.state:
            return f"one that has learnt {task.name} in another run"
    for option, value in there.method.to_dict().items():
        if option not in RESOLVED and config.method.to_dict().get(option) != value:
            return f"one of the method {there.method.name} with {option}={value!r}"
    return None
