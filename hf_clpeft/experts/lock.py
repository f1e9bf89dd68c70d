"""A read-write lock: any number of readers, or one writer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch


F = TypeVar("F", bound=Callable[..., Any])


class ReadWriteLock:
    """A reentrant lock shared by readers and exclusive to a writer; a reader cannot upgrade to a writer.

    Waiting writers take precedence over new readers. A copy is a new lock. Compiled code does not lock.

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
        self._readers: dict[int, int] = {}  # thread id to nesting depth
        self._writer, self._depth, self._waiting = 0, 0, 0

    def __reduce__(self) -> tuple:
        return ReadWriteLock, ()

    def reading(self) -> AbstractContextManager[None]:
        """Context manager: waits for the writer, and blocks writers until it exits."""
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
        """Context manager: waits for all other threads, and blocks them until it exits.

        Raises:
            `RuntimeError`: This thread holds the lock for reading, so it would deadlock.
        """
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                if me in self._readers:
                    raise RuntimeError("A thread that holds the lock for reading cannot acquire it for writing.")
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
    """Decorator: runs a method under the read lock of `self.bank`; see [`ExpertBank.reading`]."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.bank.reading():
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def writing(method: F) -> F:
    """Decorator: runs a method under the write lock of `self.bank`; see [`ReadWriteLock.writing`]."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.bank.lock.writing():
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]
