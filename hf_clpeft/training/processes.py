"""What processes that train together have to agree on: how they began, when to stop, and that one of them is gone."""

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
    """Training cannot go on as it was asked to. What was learnt before is untouched.

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
    """Whether this machine has no accelerator. Accelerate must be told, or several processes on the CPU would not find
    each other and each would learn everything alone."""
    return not torch.accelerator.is_available()


def join_processes(ddp_timeout: int) -> PartialState:
    """Makes this process one of those that `accelerate launch` started, if it did.

    Args:
        ddp_timeout (`int`): Seconds after which one that does not answer ends the run.

    Returns:
        `accelerate.PartialState`
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            # An expert is a few thousand parameters: cut in pieces, it could only be saved in pieces.
            os.environ[f"ACCELERATE_USE_{name}"] = "false"
            logger.warning("%s has nothing to shard here: the backbone is frozen. Sharing out batches alone.", name)
    return PartialState(cpu=cpu_only(), timeout=timedelta(seconds=ddp_timeout))


class Stop(threading.Event):
    """Set to end training where it can go on.

    Attributes:
        signal (`int`): The signal that asked for it.
    """

    signal: int = signal.SIGINT


def any_process_stops(stop: Stop, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: they must all do so at the same place, and say the same of it."""
    if accelerator.num_processes == 1:
        return stop.is_set()
    asked = torch.tensor([stop.signal if stop.is_set() else 0], device=accelerator.device)
    number = int(accelerator.gather(asked).max())
    if number:
        stop.signal = number
    return number > 0


@contextmanager
def explaining_lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """Says what it means when waiting for another process fails. What torch raises then is any `RuntimeError`."""
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "NCCL", "Timed out", "timed out", "Connection closed")
        if accelerator.num_processes == 1 or not any(word in str(error) for word in words):
            raise
        raise TrainingError(
            "Another process has died, or has not answered for ddp_timeout seconds; if it said why, that stands "
            "above. Go on with --resume_from_checkpoint auto."
        ) from error


def same_everywhere(module: torch.nn.Module, accelerator: Accelerator) -> None:
    """Gives every process the tensors of the main one: what each has computed may differ in the last digits.

    Args:
        module (`torch.nn.Module`): Its parameters and buffers, which have the same shapes everywhere.
        accelerator (`accelerate.Accelerator`): Of these processes.
    """
    if accelerator.num_processes == 1:
        return
    tensors = [*module.parameters(), *module.buffers()]
    digests = [xxhash.xxh3_64_hexdigest(tensor.detach().cpu().contiguous().numpy().tobytes()) for tensor in tensors]
    for tensor, *found in zip(tensors, *gather_object([digests]), strict=True):
        if len(set(found)) > 1:  # few do, and some are large
            tensor.data.copy_(broadcast(tensor.detach().to(accelerator.device)))
