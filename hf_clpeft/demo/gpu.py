"""ZeroGPU: on a Space that has it, a GPU is lent for the time of one call; elsewhere nothing is changed."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar


SECONDS = 30  # for which a GPU is asked; less waits a shorter time
F = TypeVar("F", bound=Callable[..., Any])


def on_gpu(function: F) -> F:
    """Decorates an endpoint so that `spaces.GPU` lends it a GPU, if the package is there.

    ZeroGPU calls it in a process of its own, whose changes are lost. So it decorates what answers, not what teaches.

    Example:

    ```py
    >>> from hf_clpeft.demo.gpu import on_gpu

    >>> on_gpu(len)("abc")
    3

    ```
    """
    try:
        lend = import_module("spaces").GPU
    except (ImportError, AttributeError):  # the latter is a folder of that name beside a script
        return function
    return lend(duration=SECONDS)(function)
