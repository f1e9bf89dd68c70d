"""Distributed training: joining the process group, stopping together, and detecting lost processes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import xxhash
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, gather_object

from ..config.errors import HfClpeftError
from ..config.text import get_logger


logger = get_logger(__name__)


class TrainingError(HfClpeftError, RuntimeError):
    """Training failed or cannot be done as configured. Tasks learnt before are not affected.

    Example:

    ```py
    >>> from hf_clpeft import TrainingError

    >>> raise TrainingError("The loss is not finite.")
    Traceback (most recent call last):
        ...
    hf_clpeft.training.processes.TrainingError: The loss is not finite.

    ```
    """


def cpu_only() -> bool:
    """Whether this machine has no accelerator. Accelerate must be told, else processes on the CPU do not form a
    group, and each trains on all data."""
    return not torch.accelerator.is_available()


def join_processes(ddp_timeout: int) -> PartialState:
    """Joins the process group of `accelerate launch`, if any, with a timeout of collectives in seconds."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            # An expert has a few thousand parameters; sharded, it could not be saved as a whole.
            os.environ[f"ACCELERATE_USE_{name}"] = "false"
            logger.warning("%s has nothing to shard here, as the backbone is frozen. Using DDP.", name)
    return PartialState(cpu=cpu_only(), timeout=timedelta(seconds=ddp_timeout))


class Stop(threading.Event):
    """An event that ends training at the next point from which it can be resumed.

    Attributes:
        signal (`int`): The signal that set it.
    """

    signal: int = signal.SIGINT


def any_process_stops(stop: Stop, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop, as all must stop at the same step with the same signal."""
    if accelerator.num_processes == 1:
        return stop.is_set()
    asked = torch.tensor([stop.signal if stop.is_set() else 0], device=accelerator.device)
    number = int(accelerator.gather(asked).max())
    if number:
        stop.signal = number
    return number > 0


@contextmanager
def explaining_lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """Turns errors of collective operations, of which torch makes plain `RuntimeError`s, into [`TrainingError`]."""
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "NCCL", "Timed out", "timed out", "Connection closed")
        if accelerator.num_processes == 1 or not any(word in str(error) for word in words):
            raise
        raise TrainingError(
            "Another process has died, or has not answered for ddp_timeout seconds; see its own error above, if "
            "any. Resume with --resume_from_checkpoint auto."
        ) from error


def same_everywhere(module: torch.nn.Module, accelerator: Accelerator) -> None:
    """Broadcasts parameters and buffers of the main process, as computed values may differ by rounding."""
    if accelerator.num_processes == 1:
        return
    tensors = [*module.parameters(), *module.buffers()]
    digests = [xxhash.xxh3_64_hexdigest(tensor.detach().cpu().contiguous().numpy().tobytes()) for tensor in tensors]
    for tensor, *found in zip(tensors, *gather_object([digests]), strict=True):
        if len(set(found)) > 1:  # few do, and some are large
            tensor.data.copy_(broadcast(tensor.detach().to(accelerator.device)))
