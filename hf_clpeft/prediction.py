"""What a model says about an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Args:
        label (`str`, *optional*): Name of the likeliest class; `None` if the image is rejected: of none of the tasks.
        score (`float`): Softmax score of the likeliest class, in [0, 1]; 1 under a task with a single class.
        expert (`str`, *optional*): Name of the expert that judged the image; the nearest, where several did; `None`
            in methods that classify without.
        distance (`float`): How far the image's query features are from it, or from the nearest task, in the measure
            of the router: in [0, 2] with prototypes or keys.
        typicality (`float`, *optional*): Which share of a task's own images lie as far from its prototypes as this
            one, or farther: the largest over all tasks, in whole percent. `None` where that is not known.
        classes (`dict[str, float]`): The likeliest classes with their scores, likeliest first.
        experts (`dict[str, float]`): The nearest experts with their distances, nearest first.

    Example:

    ```py
    >>> from hf_clpeft import Prediction

    >>> Prediction("cat", 0.98, "task-000", 0.41, 0.38, {"cat": 0.98}, {"task-000": 0.41}).label
    'cat'

    ```
    """

    label: str | None
    score: float
    expert: str | None
    distance: float
    typicality: float | None
    classes: dict[str, float]
    experts: dict[str, float]


@dataclass
class ContinualOutput(ModelOutput):
    """What a forward pass gives, in the form that `transformers.pipeline` reads.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): −inf where an expert knows no such class.
        selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Experts of each image, nearest first.
        distances (`torch.Tensor` of shape `(batch, experts)`): How far every expert is from the image's query
            features.
    """

    logits: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    distances: torch.Tensor | None = None


def read_output(
    output: ContinualOutput,
    classes: Sequence[str],
    experts: Sequence[str],
    typicality: torch.Tensor | None,
    reject_rate: float,
    top_k: int,
) -> list[Prediction]:
    """Puts a forward pass in words.

    Args:
        output ([`ContinualOutput`]): Of a batch.
        classes (sequence of `str`): Names of the classes, in the order of the logits.
        experts (sequence of `str`): Names of the experts, in the order of the distances.
        typicality (`torch.Tensor` of shape `(batch,)`, *optional*): The largest over all tasks, where they have
            prototypes.
        reject_rate (`float`): Images that are less typical get no label.
        top_k (`int`): How many classes and experts to tell.

    Returns:
        `list[Prediction]`: One per image.
    """
    assert output.logits is not None and output.selection is not None and output.distances is not None
    scores, likeliest = output.logits.softmax(dim=1).topk(min(top_k, len(classes)))
    nearest_distances, nearest = output.distances.topk(min(top_k, len(experts)), largest=False)
    chosen = output.selection.reshape(len(scores), -1)[:, 0]
    distance = output.distances.gather(1, chosen[:, None])[:, 0]
    # Rounded, as 0.05 in float32 is not what Python calls 0.05.
    typicalities: list[float | None] = [None] * len(scores)
    if typicality is not None:
        typicalities = [round(value, 2) for value in typicality.tolist()]
    columns = (scores, likeliest, nearest_distances, nearest, chosen, distance)
    predictions = []
    for *row, typical in zip(*(column.tolist() for column in columns), typicalities, strict=True):
        image_scores, image_classes, far, near, expert, its_distance = row
        rejected = typical is not None and typical < reject_rate
        predictions.append(
            Prediction(
                label=None if rejected else classes[image_classes[0]],
                score=image_scores[0],
                expert=experts[expert] if experts else None,
                distance=its_distance,
                typicality=typical,
                classes={classes[number]: score for number, score in zip(image_classes, image_scores, strict=True)},
                experts={experts[number]: value for number, value in zip(near, far, strict=True)},
            )
        )
    return predictions
