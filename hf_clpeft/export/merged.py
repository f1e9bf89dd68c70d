"""One expert merged into the backbone, as a plain image classifier of `transformers`."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..backbones import Backbone
from ..backbones.loading import building
from ..experts import Expert, ExpertError
from ..experts.expert import make_peft_model
from ..methods import Heads
from ..model import ContinualModel
from .places import find_expert, find_task, written


if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # relative to the largest logit, or to 1


def export_merged(model: ContinualModel, task: str, folder: str | Path, overwrite: bool = False) -> None:
    """Exports the expert of a task, merged into the backbone, as a `transformers` classifier of that task's classes.

    Load it with `pipeline("image-classification", folder)`. Before anything is written, its logits are compared with
    those of the model.

    Args:
        model ([`ContinualModel`]): A model in `float32` that has learnt the task; it is not modified.
        task (`str`): Name of the task.
        folder (`str` or `Path`): Created if missing.
        overwrite (`bool`, *optional*, defaults to `False`): Replace another adapter or classifier in the folder.

    Raises:
        [`ConfigError`]: The model has learnt no such task, or the folder holds another model.
        `OSError`: It cannot be written; the folder is unchanged.
        [`ExpertError`]: Experts do not belong to tasks or are prompts, the method has no linear head, the backbone is
            not in `float32`, or the classifier of `transformers` for this backbone has different logits.

    Example:

    ```py
    >>> import torch
    >>> from transformers import AutoModelForImageClassification
    >>> from hf_clpeft import ContinualModel, s_lora
    >>> from hf_clpeft.export import export_merged

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(r=1, k=1))
    >>> model.start_task("task-000", ["cat", "dog"])
    >>> images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    >>> model.finish_task(lambda features: (features(images), labels), num_train_images=4)
    >>> export_merged(model, "task-000", "cat-or-dog")
    >>> AutoModelForImageClassification.from_pretrained("cat-or-dog").config.id2label
    {0: 'cat', 1: 'dog'}

    ```
    """
    classifier = merge_expert(model, task)
    with written(folder, overwrite) as staging:
        classifier.save_pretrained(staging)
        model.backbone.processor.save_pretrained(staging)


def merge_expert(model: ContinualModel, task: str) -> Any:
    """The classifier of `transformers` that [`export_merged`] writes, on the CPU, after a check of its logits."""
    number = find_task(model, task)
    expert, heads = model.bank[find_expert(model, number)], model.heads
    if heads is None:
        raise ExpertError(
            f"{model.config.method.name} has no linear head to put on a merged model. Write the expert of {task!r} "
            "with export_adapter."
        )
    if expert.config.is_prompt_learning:
        raise ExpertError(
            f"Expert {expert.name!r} is a prompt or a prefix, which has no weights to merge into. Write it with "
            "export_adapter."
        )
    dtype = model.backbone.model.dtype
    if dtype != torch.float32:
        raise ExpertError(f"A merged model is written in float32, and this one is in {dtype}; load it in float32.")
    numbers = [model.config.classes.index(label) for label in model.config.tasks[number].classes]
    with torch.random.fork_rng(devices=[]):  # random weights, overwritten below, must not advance the global generator
        classifier: Any = _make_classifier(model, model.config.tasks[number].classes)
        _merge(model, expert, classifier)
    _write_rows(classifier.classifier, *heads.rows_of(number, numbers))
    _check_logits(model, heads, number, numbers, classifier)
    return classifier


def _make_classifier(model: ContinualModel, classes: list[str]) -> "PreTrainedModel":
    """A classifier with a copy of the frozen backbone, on the CPU; its head is random."""
    from transformers import AutoModelForImageClassification

    config = copy.deepcopy(model.backbone.model.config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: i for i, label in config.id2label.items()}
    bare = model.backbone.model
    try:
        with building:
            classifier = AutoModelForImageClassification.from_config(config).eval()
        classifier.base_model.load_state_dict(bare.state_dict())
    except (RuntimeError, ValueError) as error:
        raise ExpertError(f"transformers has no image classifier around a {type(bare).__name__}: {error}") from error
    return classifier


def _merge(model: ContinualModel, expert: Expert, classifier: "PreTrainedModel") -> None:
    bare = cast("PreTrainedModel", classifier.base_model)
    backbone = Backbone(bare, model.backbone.processor, model.backbone.config)
    peft_model = make_peft_model(backbone, expert.config)
    expert.copy_to(peft_model)
    peft_model.merge_and_unload()


@torch.no_grad()
def _write_rows(layer: torch.nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Copies head rows. Weights of inputs after [CLS], as in DINOv2's classifier, are zeroed."""
    layer.weight.zero_()
    layer.weight[:, : weight.shape[1]] = weight
    layer.bias.copy_(bias)


@torch.no_grad()
def _check_logits(
    model: ContinualModel, heads: Heads, number: int, numbers: list[int], classifier: torch.nn.Module
) -> None:
    shape = model.backbone.input_shape
    pixel_values = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    selection = torch.full((4,), find_expert(model, number), device=model.device)
    logits = heads(model.bank(pixel_values, selection), torch.full_like(selection, number))[:, numbers]
    merged_logits = classifier.to(model.device)(pixel_values=pixel_values).logits
    classifier.to("cpu")
    difference = (merged_logits - logits).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, merged_logits.abs().max().item()):
        raise ExpertError(
            f"Logits of {type(classifier).__name__} with the expert of {model.config.tasks[number].name!r} merged "
            f"differ by {difference:.2g} from the model's: it does not classify [CLS] as the model does. Write the "
            "expert with export_adapter instead."
        )
