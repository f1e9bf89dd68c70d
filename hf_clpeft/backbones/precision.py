"""What is fast on a GPU and rounds, and the state that stays in float32 all the same."""

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch


P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")


WITH_FLOAT64 = {"cuda"}  # devices that compute with it, besides the CPU
COPIES = 8  # of the numbers that a sum is over, which may be in memory at once


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


class _Exactly:
    """Context manager: float32 matrix products are not rounded to TF32. The setting is one for all threads."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, "highest"

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_float32_matmul_precision(self._before)


_exactly = _Exactly()


def go_fast(device: torch.device) -> str | None:
    """Lets a CUDA GPU round in what the backbone computes: float32 matrix products to TF32. Other devices stay exact.

    Returns:
        Mixed precision for a run that asks for none: `"bf16"` if the GPU has it. `None` on other devices, or if
        `accelerate launch` was told another one.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones.precision import go_fast

    >>> go_fast(torch.device("cpu")), torch.get_float32_matmul_precision()
    (None, 'highest')

    ```
    """
    if device.type != "cuda":
        return None
    torch.set_float32_matmul_precision("high")
    told = "ACCELERATE_MIXED_PRECISION" in os.environ
    return "bf16" if not told and torch.cuda.is_bf16_supported(including_emulation=False) else None


def for_sums(device: torch.device, count: int) -> torch.device:
    """Where sums over so many numbers are computed in float64: on a CUDA GPU with room for them, else on the CPU.

    Args:
        device (`torch.device`): The device of the model.
        count (`int`): Number of numbers.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones.precision import for_sums

    >>> for_sums(torch.device("mps"), count=1_000)  # which has no float64
    device(type='cpu')

    ```
    """
    room = math.inf
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # but kept for later
        room = torch.cuda.mem_get_info(device)[0] + unused
    fits = device.type in WITH_FLOAT64 and 8 * COPIES * count <= room
    return device if fits else torch.device("cpu")


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Context manager that disables autocast on a device, and TF32 on a CUDA GPU.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones.precision import without_autocast

    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
    ...     print((torch.eye(2) @ torch.eye(2)).dtype)
    torch.float32

    ```
    """
    casts = torch.is_autocast_enabled(device.type)
    with (
        torch.autocast(device.type, enabled=False) if casts else nullcontext(),
        _exactly if device.type == "cuda" else nullcontext(),
    ):
        yield


def in_float32(
    method: Callable[Concatenate[M, torch.Tensor, P], R],
) -> Callable[Concatenate[M, torch.Tensor, P], R]:
    """Decorator: casts the features passed to a method to float32 and disables autocast while it runs."""

    @wraps(method)
    def wrapped(self: M, features: torch.Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(features.device):
            return method(self, features.float(), *args, **kwargs)

    return wrapped
