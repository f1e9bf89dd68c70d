"""One expert as a plain PEFT adapter."""

from pathlib import Path

from ..model import ContinualModel
from .places import find_expert, find_task, written


def export_adapter(model: ContinualModel, task: str, folder: str | Path, overwrite: bool = False) -> None:
    """Exports the expert of a task as a plain PEFT adapter, without its head.

    Args:
        model ([`ContinualModel`]): A model that has learnt the task.
        task (`str`): Name of the task.
        folder (`str` or `Path`): Created if missing.
        overwrite (`bool`, *optional*, defaults to `False`): Replace another adapter or classifier in the folder.

    Raises:
        [`ConfigError`]: The model has learnt no such task, or the folder holds another model.
        [`ExpertError`]: Experts do not belong to tasks.
        `OSError`: It cannot be written; the folder is unchanged.

    Example:

    ```py
    >>> import torch
    >>> from peft import PeftConfig
    >>> from hf_clpeft import ContinualModel, s_lora
    >>> from hf_clpeft.export import export_adapter

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(r=1, k=1))
    >>> model.start_task("task-000", ["cat", "dog"])
    >>> images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    >>> model.finish_task(lambda features: (features(images), labels), num_train_images=4)
    >>> export_adapter(model, "task-000", "adapter")
    >>> PeftConfig.from_pretrained("adapter").r
    1

    ```
    """
    expert = model.bank[find_expert(model, find_task(model, task))]
    with written(folder, overwrite) as staging:
        expert.save(staging)
