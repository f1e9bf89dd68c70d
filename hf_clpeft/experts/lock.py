"""Who may use what threads share: any number who only read it, or one who changes it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch


F = TypeVar("F", bound=Callable[..., Any])


class ReadWriteLock:
    """A lock that readers share and a writer has alone. Both may be nested; only a reader cannot become a writer.

    A writer who waits goes before readers who come later. A copy has a lock of its own. Compiled code takes none.

    Example:

    ```py
    >>> from hf_clpeft.experts.lock import ReadWriteLock

    >>> lock = ReadWriteLock()
    >>> with lock.writing(), lock.reading():
    ...     print("alone")
    alone

    ```
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: dict[int, int] = {}  # thread to how often it has entered
        self._writer, self._depth, self._waiting = 0, 0, 0

    def __reduce__(self) -> tuple:
        return ReadWriteLock, ()

    def reading(self) -> AbstractContextManager[None]:
        """Waits while another thread changes something; nothing changes inside this context."""
        return nullcontext() if torch.compiler.is_compiling() else self._read()

    @contextmanager
    def _read(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._condition:
            if me not in self._readers and self._writer != me:
                self._condition.wait_for(lambda: not self._writer and not self._waiting)
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                    self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Waits for all other threads; they wait while this context lasts.

        Raises:
            `RuntimeError`: This thread is reading, and would wait for itself.
        """
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                if me in self._readers:
                    raise RuntimeError("A thread cannot change what it is reading.")
                self._waiting += 1
                try:
                    self._condition.wait_for(lambda: not self._writer and not self._readers)
                finally:
                    self._waiting -= 1
                    self._condition.notify_all()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = 0
                    self._condition.notify_all()


def reading(method: F) -> F:
    """Lets a method of what has a `bank` read it: see [`ExpertBank.reading`]."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.bank.reading():
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def writing(method: F) -> F:
    """Lets a method of what has a `bank` change it: see [`ReadWriteLock.writing`]."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.bank.lock.writing():
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]
