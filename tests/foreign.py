"""A device that this machine does not have: its tensors compute on the CPU, but behave as those of a GPU do.

Tensors of two devices cannot be mixed. Whatever makes the CPU wait for a GPU is written down: values that are read,
shapes that depend on them, and copies that block. Unlike fake tensors they have values, so that whole runs can be
compared with those on the CPU. It is called "meta", the only other device of which every build of torch knows how to
compute gradients.
"""

import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from hf_clpeft.backbones import precision


DEVICE = torch.device("meta")
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
# Values that are read, and results whose shape depends on values.
READING = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class ForeignTensor(torch.Tensor):
    """A tensor of the foreign device; `inner` holds its values, on the CPU."""

    inner: torch.Tensor

    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), dtype=inner.dtype, device=DEVICE, requires_grad=inner.requires_grad, **layout
        )
        made.inner = inner
        return made

    def __init__(self, inner):
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, None)

    def item(self):
        return self.cpu().item()  # of a real tensor of this name there is no value

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"foreign {self.inner!r}"


class ForeignDevice(TorchDispatchMode):
    """Where the foreign device exists.

    Attributes:
        waits (`list[str]`): What the CPU and the device have waited for each other for, and where.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, self.waits)

    @contextmanager
    def patched(self):
        """Context manager: on, and libraries that ask what the device can do get an answer."""
        autocasts = torch.is_autocast_enabled
        with torch.device("meta"):  # torch notes once which functions make tensors: not those below
            torch.empty(0)
        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != DEVICE.type and autocasts(kind))
            patch.setattr(precision, "WITH_FLOAT64", {DEVICE.type})
            patch.setattr("accelerate.Accelerator.device", property(lambda self: DEVICE))
            patch.setattr(torch, "tensor", partial(_tensor, torch.tensor))
            yield self


def _run(function, args, kwargs, waits):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    foreign = [tensor for tensor in tensors if isinstance(tensor, ForeignTensor)]
    name, wanted = function._schema.name.removeprefix("aten::"), kwargs.get("device")
    if name == "_fused_sdp_choice":
        return 0  # attention by plain operations
    there = bool(foreign) if wanted is None else wanted.type == DEVICE.type
    if function in COPIES:
        _copying(function, args, kwargs, there, bool(foreign), waits)
    elif foreign:
        if function in INDEXING:
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                _wait(waits, "a mask whose number of hits must be read")
            if any(index is not None and not isinstance(index, ForeignTensor) for index in args[1]):
                _wait(waits, "indices on the CPU")
            tensors = [tensor for tensor in tensors if all(tensor is not index for index in args[1])]
        if name in READING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            _wait(waits, f"{name} reads values")
        if any(not isinstance(tensor, ForeignTensor) and tensor.dim() for tensor in tensors):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found two, cpu and {DEVICE}."
            )
    result = function(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if not there:
        return result
    result = tree_map(_wrapped, result)
    return return_and_correct_aliasing(function, args, kwargs, result) if foreign else result


def _tensor(make, values, device=None, **options):
    """`torch.tensor`, which else fills a tensor of the device without asking the dispatcher."""
    made = make(values, **options)
    return made if device is None else made.to(device)


def _copying(function, args, kwargs, there, from_there, waits):
    if function is aten.copy_.default:
        there, from_there = (isinstance(tensor, ForeignTensor) for tensor in args[:2])
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    else:
        blocks = not kwargs.get("non_blocking")
    if from_there and not there:
        _wait(waits, "a copy to the CPU")
    elif there and not from_there and blocks:
        _wait(waits, "a copy from the CPU that blocks")


def _wait(waits, why):
    if waits is not None:
        frame, where = sys._getframe(), []
        while frame is not None and len(where) < 3:
            path = frame.f_code.co_filename
            if "hf_clpeft" in path:
                where.append(f"{path.rpartition('hf_clpeft/')[2]}:{frame.f_lineno}")
            frame = frame.f_back
        waits.append(f"{why} ({', '.join(where)})")


def _unwrapped(leaf):
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.inner if isinstance(leaf, ForeignTensor) else leaf


def _wrapped(leaf):
    return ForeignTensor(leaf) if type(leaf) is torch.Tensor else leaf
