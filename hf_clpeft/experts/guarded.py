"""Threads that share experts: one of them trains, and the others read meanwhile unless what they read changes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .expert import ExpertError
from .lock import ReadWriteLock


class Guarded(torch.nn.Module):
    """Base of what several threads use.

    Attributes:
        lock ([`ReadWriteLock`]): Held while experts are read or moved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = ReadWriteLock()
        self._trained: tuple[str, int] | None = None  # name of what is trained, and thread id
        self._learner = 0  # id of the thread that has reserved training
        self._unreadable = ""  # why other threads may not read during training; empty if they may

    def abandon(self) -> None:
        """Ends training and rolls back."""
        raise NotImplementedError

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context manager: no other thread modifies the bank until it exits.

        Raises:
            [`ExpertError`]: Another thread is training the pool, or other state of the method in place.
        """
        with self.lock.reading():
            if self._unreadable and not torch.compiler.is_compiling():
                self._refuse_strangers(self._unreadable)
            yield

    def refuse_readers(self, why: str) -> None:
        """Waits for readers, then raises an error in other threads that read, until training is finished or abandoned.

        Args:
            why (`str`): Reason, for the error message.
        """
        with self.lock.writing():
            self._unreadable = why

    def claim(self, name: str) -> None:
        """Marks an expert as trained by this thread, until it is finished or abandoned.

        Raises:
            [`ExpertError`]: Another thread is training.
        """
        with self.lock.writing():
            self._refuse_strangers("one task is learnt at a time")
            self._trained = name, threading.get_ident()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Context manager: reserves training for this thread, and abandons an unfinished expert on exit.

        Raises:
            [`ExpertError`]: Another thread is training.
        """
        with self.lock.writing():
            self._refuse_strangers("one task is learnt at a time")
            self._learner = threading.get_ident()
        try:
            yield
        finally:
            self.abandon()
            self._learner = 0

    def _refuse_strangers(self, why: str) -> None:
        """Raises [`ExpertError`] if another live thread is training."""
        what, thread = self._trained or ("a task", self._learner)
        if thread not in (0, threading.get_ident()) and thread in (other.ident for other in threading.enumerate()):
            raise ExpertError(
                f"Another thread is training {what} in this model, and {why}. Wait until it has finished the task, or "
                "use another model, loaded from the same folder."
            )
