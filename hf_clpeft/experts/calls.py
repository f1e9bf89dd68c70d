"""What is selected in the call that a thread is in: threads share a backbone, and each has its own selection."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch


class Call(Protocol):
    """One forward pass of a backbone, in which experts change what some of its layers give."""

    def update(self, key: str, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """What the layer of that key gives instead, or `None` for its own output."""


class _Running(threading.local):
    """The call that each thread is in. Not a context variable: those cannot be compiled."""

    def __init__(self) -> None:
        self.call: Call | None = None


_running = _Running()
hooking = threading.RLock()  # held by who changes or copies the hooks of a backbone


@contextmanager
def during(call: Call) -> Iterator[None]:
    """Lets a call change what hooked layers give to this thread, and to no other, inside this context."""
    outer, _running.call = _running.call, call
    try:
        yield
    finally:
        _running.call = outer


def hook(layer: torch.nn.Module, key: str) -> None:
    """Lets a layer ask the call that runs, by its key; idle while there is none.

    One hook serves all banks that share a backbone, and holds on to none of them.
    """
    with hooking:
        if not any(getattr(known, "func", None) is _ask for known in layer._forward_hooks.values()):
            layer.register_forward_hook(partial(_ask, key))


def _ask(key: str, layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    call = _running.call
    return None if call is None else call.update(key, args, output)
