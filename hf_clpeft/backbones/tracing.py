"""What `torch.export` needs: numbers that are read from tensors are known before, as in a graph there are none."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..config.errors import ConfigError


T = TypeVar("T")
CALL_FIRST = "Call the model once, with any images, before it is exported."


def tracing() -> bool:
    """Whether `torch.export` records a graph, which must be the same for all images and sizes of a batch.

    Example:

    ```py
    >>> from hf_clpeft.backbones.tracing import tracing

    >>> tracing()
    False

    ```
    """
    # torch 2.6 does not tell it from torch.compile
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


class ReadsOnce(torch.nn.Module):
    """Base of modules that read numbers from their buffers, once for as long as these stay.

    Reading makes the CPU wait for a GPU. A buffer is replaced, and not written to, when it changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, tuple[torch.Tensor, Any]] = {}

    def once(self, name: str, read: Callable[[torch.Tensor], T]) -> T:
        """What is read from a buffer.

        Args:
            name (`str`): Name of the buffer.
            read (callable): Always the same for a buffer.

        Raises:
            [`ConfigError`]: `torch.export` records a graph, and nothing was read since the buffer has changed.
        """
        buffer, known = getattr(self, name), self._known.get(name)
        if tracing():  # the buffer is a stand-in for the one that was read
            if known is None:
                raise ConfigError(CALL_FIRST)
        elif known is None or known[0] is not buffer:
            known = self._known[name] = buffer, read(buffer)
        return known[1]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__.get("_known", {}).pop(name, None)
