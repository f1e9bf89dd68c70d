"""State that stays in float32 when a model is cast or autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch


P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")


class KeepsPrecision(torch.nn.Module):
    """A module whose tensors ignore dtype casts of the enclosing model and only follow it to devices.

    Experts, router statistics and heads take little memory, and a model that was cast to bfloat16 and back saves the
    same bytes.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import PrototypeRouter

    >>> PrototypeRouter(query_size=2).half().prototypes.dtype
    torch.float32

    ```
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context manager that disables autocast on a device.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones.precision import without_autocast

    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
    ...     print((torch.eye(2) @ torch.eye(2)).dtype)
    torch.float32

    ```
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def in_float32(
    method: Callable[Concatenate[M, torch.Tensor, P], R],
) -> Callable[Concatenate[M, torch.Tensor, P], R]:
    """Decorator: casts the features passed to a method to float32 and disables autocast while it runs."""

    @wraps(method)
    def wrapped(self: M, features: torch.Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(features.device):
            return method(self, features.float(), *args, **kwargs)

    return wrapped
