"""Formulas over the accuracy matrix `A[i, j]`: accuracy on task j's test split after learning task i.

Libraries differ in these definitions, so each docstring states its formula. T is the number of tasks. Entries that
were not measured are NaN, and so is every metric that depends on one.
"""

import math

import numpy as np
from numpy.typing import ArrayLike


BINS = 15  # of confidence


def _square(matrix: ArrayLike) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"The accuracy matrix must be square with one row per task, but has shape {matrix.shape}.")
    return matrix


def average_accuracy(matrix: ArrayLike) -> float:
    """Mean of the last row: `mean(A[T-1, :])`.

    Args:
        matrix (array of shape `(T, T)`): Accuracies in [0, 1].

    Returns:
        `float`: In [0, 1].

    Raises:
        `ValueError`: The matrix is not square.

    Example:

    ```py
    >>> from hf_clpeft.metrics import average_accuracy

    >>> average_accuracy([[0.9, 0.0], [0.7, 0.8]])
    0.75

    ```
    """
    return float(_square(matrix)[-1].mean())


def average_incremental_accuracy(matrix: ArrayLike) -> float:
    """Mean over i of the mean over the tasks seen so far: `mean_i mean(A[i, :i+1])`.

    Args:
        matrix (array of shape `(T, T)`): Accuracies in [0, 1].

    Returns:
        `float`: In [0, 1].

    Example:

    ```py
    >>> from hf_clpeft.metrics import average_incremental_accuracy

    >>> average_incremental_accuracy([[0.9, 0.0], [0.7, 0.8]])
    0.825

    ```
    """
    matrix = _square(matrix)
    return float(np.mean([row[: i + 1].mean() for i, row in enumerate(matrix)]))


def forgetting(matrix: ArrayLike) -> float:
    """Drop from the best earlier accuracy to the final one: `mean_{j<T-1} (max_{i in [j, T-2]} A[i, j] − A[T-1, j])`.

    Args:
        matrix (array of shape `(T, T)`): Accuracies in [0, 1].

    Returns:
        `float`: In [-1, 1]; lower is better. 0 for a single task.

    Example:

    ```py
    >>> from hf_clpeft.metrics import forgetting

    >>> round(forgetting([[0.9, 0.0], [0.7, 0.8]]), 3)
    0.2

    ```
    """
    matrix = _square(matrix)
    last = len(matrix) - 1
    return float(np.mean([matrix[j:last, j].max() - matrix[last, j] for j in range(last)])) if last else 0.0


def backward_transfer(matrix: ArrayLike) -> float:
    """Effect of later tasks on earlier ones: `mean_{j<T-1} (A[T-1, j] − A[j, j])`.

    Args:
        matrix (array of shape `(T, T)`): Accuracies in [0, 1].

    Returns:
        `float`: In [-1, 1]; higher is better. 0 for a single task.

    Example:

    ```py
    >>> from hf_clpeft.metrics import backward_transfer

    >>> round(backward_transfer([[0.9, 0.0], [0.7, 0.8]]), 3)
    -0.2

    ```
    """
    matrix = _square(matrix)
    last = len(matrix) - 1
    return float(np.mean(matrix[last, :last] - matrix.diagonal()[:last])) if last else 0.0


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike) -> float:
    """Effect of earlier tasks on later ones: `mean_{j>0} (A[j-1, j] − untrained[j])`.

    Args:
        matrix (array of shape `(T, T)`): Accuracies in [0, 1]; only the entries right above the diagonal are used.
        untrained (`float` or array of shape `(T,)`): Accuracy of an untrained model on each task.

    Returns:
        `float`: In [-1, 1]; higher is better. NaN where tasks were not evaluated before they were learnt.

    Example:

    ```py
    >>> from hf_clpeft.metrics import forward_transfer

    >>> round(forward_transfer([[0.9, 0.6], [0.7, 0.8]], untrained=0.5), 3)
    0.1

    ```
    """
    matrix = _square(matrix)
    if len(matrix) == 1:
        return 0.0
    untrained = np.broadcast_to(np.asarray(untrained, dtype=np.float64), len(matrix))
    return float(np.mean(matrix.diagonal(offset=1) - untrained[1:]))


def routing_accuracy(confusion: ArrayLike) -> float:
    """Fraction of images that were routed to the expert of their own task.

    Args:
        confusion (array of shape `(T, T)`): `confusion[j, e]`: test images of task j routed to expert e.

    Returns:
        `float`: In [0, 1].

    Example:

    ```py
    >>> from hf_clpeft.metrics import routing_accuracy

    >>> routing_accuracy([[8, 2], [1, 9]])
    0.85

    ```
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    return float(confusion.trace() / confusion.sum())


def reliability_table(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Images by the confidence of their likeliest class, in 15 bins of equal width.

    Args:
        confidence (array of shape `(images,)`): Softmax scores of the likeliest classes.
        right (boolean array of shape `(images,)`): Whether these are right.

    Returns:
        Array of shape `(15, 3)`: See [`calibration_error`].

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.metrics.continual import reliability_table

    >>> reliability_table(np.array([0.95, 0.99, 0.4]), np.array([True, False, True]))[[5, 14]].tolist()
    [[1.0, 0.4, 1.0], [2.0, 1.94, 1.0]]

    ```
    """
    places = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1
    columns = np.stack([np.ones(len(confidence)), confidence, right], axis=1)
    table = np.zeros((BINS, 3))
    np.add.at(table, places, columns)
    return table


def calibration_error(reliability: ArrayLike) -> float:
    """Expected calibration error: the mean over images of |accuracy − confidence| of their bin.

    With few images it is above 0 even if confidence is right: 1,000 images in 15 bins come to about 0.03.

    Args:
        reliability (array of shape `(..., bins, 3)`): Of each bin of confidence, the number of images, the sum of
            their confidences, and the number of images that were right. Sums over leading dimensions.

    Returns:
        `float`: In [0, 1]; NaN without images.

    Source: Guo et al., arXiv 1706.04599, section 2.

    Example:

    ```py
    >>> from hf_clpeft.metrics import calibration_error

    >>> calibration_error([[10, 6.0, 5], [10, 9.0, 9]])  # of 20 images, half of them were too sure by 0.1
    0.05

    ```
    """
    table = np.asarray(reliability, dtype=np.float64)
    images, confidence, right = table.reshape(-1, *table.shape[-2:]).sum(axis=0).T
    return float(np.abs(right - confidence).sum() / images.sum()) if images.sum() else math.nan


def summarize(matrix: ArrayLike, untrained: ArrayLike | None = None) -> dict[str, float]:
    """Computes all metrics of this module that need only the accuracy matrix.

    Args:
        matrix (array of shape `(T, T)`): Accuracies in [0, 1].
        untrained (`float` or array of shape `(T,)`, *optional*): Accuracy of an untrained model on each task; adds
            `forward_transfer`.

    Returns:
        `dict[str, float]`: Values by name of the metric.

    Example:

    ```py
    >>> from hf_clpeft.metrics import summarize

    >>> {name: round(value, 3) for name, value in summarize([[0.9, 0.0], [0.7, 0.8]]).items()}
    {'average_accuracy': 0.75, 'average_incremental_accuracy': 0.825, 'forgetting': 0.2, 'backward_transfer': -0.2}

    ```
    """
    summary = {
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
    }
    if untrained is not None:
        summary["forward_transfer"] = forward_transfer(matrix, untrained)
    return summary
