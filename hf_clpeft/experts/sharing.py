"""Which trunk the forward passes of a thread share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..backbones.trunk import Trunk


class _Trunks(threading.local):
    """The trunks that the passes of each thread share, by the id of their owner."""

    def __init__(self) -> None:
        self.of: dict[int, Trunk] = {}


_trunks = _Trunks()


def shared(owner: object) -> Trunk | None:
    """The trunk that the passes of an owner share in this thread, if there is one."""
    return _trunks.of.get(id(owner))


@contextmanager
def sharing(owner: object, depth: int) -> Iterator[Trunk]:
    """Context manager: the passes of an owner share a trunk, in this thread only.

    Args:
        owner (`object`): For example a bank.
        depth (`int`): Number of layers of a new trunk.

    Yields:
        [`Trunk`]: That of the context manager around it, if there is one.
    """
    outer = shared(owner)
    if outer is not None:
        yield outer
        return
    _trunks.of[id(owner)] = trunk = Trunk(depth)
    try:
        yield trunk
    finally:
        del _trunks.of[id(owner)]
