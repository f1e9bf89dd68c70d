"""Thread-local forward hooks: threads share a backbone, but each call has its own selection of experts."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch


class Call(Protocol):
    """One forward pass of a backbone in which experts modify the outputs of some layers."""

    def update(self, key: str, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Returns the modified output of the layer with that key, or `None` to keep it."""


class _Active(threading.local):
    """The active call of each thread. Not a context variable, as those cannot be compiled."""

    def __init__(self) -> None:
        self.call: Call | None = None


_active = _Active()
hooks_lock = threading.RLock()  # guards changes and copies of the hooks of a backbone


@contextmanager
def active_call(call: Call) -> Iterator[None]:
    """Context manager: a call modifies the outputs of hooked layers, in this thread only."""
    outer, _active.call = _active.call, call
    try:
        yield
    finally:
        _active.call = outer


def attach_hook(layer: torch.nn.Module, key: str) -> None:
    """Attaches a forward hook that dispatches to the active call by key, and does nothing without one.

    One hook serves all banks that share a backbone and keeps no reference to them.
    """
    with hooks_lock:
        if not any(getattr(known, "func", None) is _dispatch for known in layer._forward_hooks.values()):
            layer.register_forward_hook(partial(_dispatch, key))


def _dispatch(key: str, layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    call = _active.call
    return None if call is None else call.update(key, args, output)
