"""Thread-local hooks: threads share a backbone, but each call has its own selection of experts."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch

from ..backbones.attention import intercept, updates_of


class Call(Protocol):
    """One forward pass of a backbone in which experts modify the outputs of some layers."""

    def update(self, key: str, args: tuple, output: Any) -> Any:
        """Returns the modified output of the layer with that key, or `None` to keep it.

        The output of an attention layer, for this purpose, is the pair of its keys and values.
        """


class _Active(threading.local):
    """The active calls of each thread. Not a context variable, as those cannot be compiled."""

    def __init__(self) -> None:
        self.calls: tuple[Call, ...] = ()


_active = _Active()
hooks_lock = threading.RLock()  # guards changes and copies of the hooks of a backbone


@contextmanager
def active_call(call: Call) -> Iterator[None]:
    """Context manager: a call modifies the outputs of hooked layers, in this thread only; after those around it."""
    outer, _active.calls = _active.calls, (*_active.calls, call)
    try:
        yield
    finally:
        _active.calls = outer


def attach_hook(layer: torch.nn.Module, key: str) -> None:
    """Attaches a forward hook that dispatches to the active calls by key, and does nothing without one.

    One hook serves all banks that share a backbone and keeps no reference to them.
    """
    with hooks_lock:
        if not any(getattr(known, "func", None) is _dispatch for known in layer._forward_hooks.values()):
            layer.register_forward_hook(partial(_dispatch, key))


def attach_to_attention(layer: torch.nn.Module, key: str) -> None:
    """Dispatches the keys and values of an attention layer to the active calls, as [`attach_hook`] does outputs."""
    with hooks_lock:
        if not any(getattr(known, "func", None) is _dispatch_states for known in updates_of(layer)):
            intercept(layer, partial(_dispatch_states, key))


@contextmanager
def same_calls(calls: tuple[Call, ...]) -> Iterator[None]:
    """Context manager: exactly these calls are active, whatever the thread; see [`active_calls`]."""
    outer, _active.calls = _active.calls, calls
    try:
        yield
    finally:
        _active.calls = outer


def active_calls() -> tuple[Call, ...]:
    """The calls that are active in this thread."""
    return _active.calls


def _dispatch(key: str, layer: torch.nn.Module, args: tuple, output: Any) -> Any:
    for call in _active.calls:
        updated = call.update(key, args, output)
        output = output if updated is None else updated
    return output


def _dispatch_states(key: str, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for call in _active.calls:
        states = call.update(key, (), states) or states
    return states  # type: ignore[return-value]
