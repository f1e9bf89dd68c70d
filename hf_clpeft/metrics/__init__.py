"""Continual-learning metrics as pure functions of the accuracy matrix."""

from pathlib import Path

from .continual import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    calibration_error,
    forgetting,
    forward_transfer,
    routing_accuracy,
    summarize,
)


EVALUATE_MODULE = str(Path(__file__).parent / "continual_learning")
"""Path for `evaluate.load`: the same metrics as an `evaluate` module; needs no network."""

__all__ = [
    "EVALUATE_MODULE",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "calibration_error",
    "forgetting",
    "forward_transfer",
    "routing_accuracy",
    "summarize",
]
