"""What is reported of a continual learner, as pure functions of its accuracy matrix."""

from pathlib import Path

from .continual import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    routing_accuracy,
    summarize,
)


EVALUATE_MODULE = str(Path(__file__).parent / "continual_learning")
"""Path for `evaluate.load`: the same formulas as an `evaluate` module, no network needed."""

__all__ = [
    "EVALUATE_MODULE",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "routing_accuracy",
    "summarize",
]
