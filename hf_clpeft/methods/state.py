"""State of a module: loaded from untrusted tensors, and snapshots to roll back to."""

from collections.abc import Iterable, Iterator

import torch

from ..experts.stage import Stage


ELSEWHERE = ("_", "bank.", "router.", "heads.")  # prefixes of state that is not saved, or saved in another file


def load_state(module: torch.nn.Module, tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """Validates a state dict and loads it into a module that has not grown yet.

    Dtype and number of dimensions must match. A dimension of size 0 in the module may have any size in the state dict;
    all others must match. `ParameterList`s may be longer.

    Args:
        module (`torch.nn.Module`): Module to load into.
        tensors (`dict[str, torch.Tensor]`): State dict, from a file.
        own (`dict[str, torch.Tensor]`): State dict of the module.

    Raises:
        `ValueError`: A tensor is missing, unexpected, or does not match.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.state import load_state

    >>> module = torch.nn.Linear(2, 0, bias=False)
    >>> load_state(module, {"weight": torch.ones(3, 2)}, module.state_dict())
    >>> module.weight.shape
    torch.Size([3, 2])

    ```
    """
    lists = _lists(module)
    for name in lists:
        items = {key for key in tensors if key.rpartition(".")[0] == name}
        if items != {f"{name}.{i}" for i in range(len(items))}:
            raise ValueError(f"the items of {name} are {sorted(items)[:5]}.")
    listed = {key for key in tensors.keys() | own.keys() if key.rpartition(".")[0] in lists}
    missing, unknown = own.keys() - tensors.keys() - listed, tensors.keys() - own.keys() - listed
    if missing or unknown:
        raise ValueError(f"it lacks {sorted(missing)[:3]}, and has {sorted(unknown)[:3]} too many.")
    for name, tensor in tensors.items():
        wanted = torch.float32 if name not in own or own[name].is_floating_point() else torch.int64
        if tensor.dtype != wanted:
            raise ValueError(f"{name} is of {tensor.dtype}, and is stored as {wanted}.")
        shape = own[name].shape if name in own else tensor.shape
        if tensor.dim() != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True) if b):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}, where 0 is any size.")
    fill(module, tensors)


def freeze(tensors: dict[str, torch.Tensor]) -> None:
    """Detaches tensors and drops their gradients."""
    for tensor in tensors.values():
        if tensor.is_leaf:
            tensor.requires_grad_(False)
        else:
            tensor.detach_()
        tensor.grad = None


def fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Sets parameters and buffers of any size from a complete state dict; a `ParameterList` is resized."""
    for name in _lists(module):
        parent, _, key = name.rpartition(".")
        items = [*module.get_submodule(name).parameters()][: sum(key.rpartition(".")[0] == name for key in tensors)]
        module.get_submodule(parent)._modules[key] = torch.nn.ParameterList(items)
    # A file has its tensors in any order, and items of a list are appended by number: the second before the tenth.
    for name, tensor in sorted(tensors.items(), key=lambda item: (len(item[0]), item[0])):
        path, _, key = name.rpartition(".")
        part = module.get_submodule(path)
        if key in part._buffers:
            own = part._buffers[key]
            part._buffers[key] = tensor.to(tensor if own is None else own, copy=True)
        elif key in part._parameters:
            known = part._parameters[key]
            assert known is not None
            part._parameters[key] = torch.nn.Parameter(tensor.to(known, copy=True), known.requires_grad)
        else:
            assert isinstance(part, torch.nn.ParameterList)
            part.append(torch.nn.Parameter(tensor.clone()))


class Snapshot:
    """A snapshot of a module and of the attributes of other objects, to roll back to.

    Tensors are copied to the CPU, so that it takes no memory of the device. Lists and dictionaries that are attributes
    are copied one level deep; everything else is kept by reference.

    Args:
        module (`torch.nn.Module`): The module, with all submodules except [`Stage`]s.
        others (objects, *optional*): Other objects.
        kept (iterable of `torch.Tensor`, *optional*): Tensors of the module whose values do not change, so that they
            are not copied.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.state import Snapshot

    >>> names, layer = torch.nn.ParameterList(), torch.nn.Linear(1, 1)
    >>> before = Snapshot(torch.nn.ModuleList([names, layer]))
    >>> names.append(layer.weight.data.zero_())
    ParameterList(  (0): Parameter containing: [torch.float32 of size 1x1])
    >>> before.restore()
    >>> len(names), bool(layer.weight)
    (0, True)

    ```
    """

    def __init__(self, module: torch.nn.Module, *others: object, kept: Iterable[torch.Tensor] = ()):
        parts = list(_parts(module))
        attributes = [vars(thing) for thing in (*parts, *others)]
        filled = [value for values in attributes for value in values.values() if type(value) in (dict, list)]
        self._filled = [(value, value.copy()) for value in [*attributes, *filled]]
        not_copied = set(map(id, kept))
        tensors = [tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())]
        self._tensors = [
            (tensor, tensor.detach().to("cpu", copy=True), tensor.requires_grad)
            for tensor in tensors
            if tensor is not None and id(tensor) not in not_copied
        ]

    def restore(self) -> None:
        """Rolls back to the snapshot."""
        for value, before in self._filled:
            if isinstance(value, list):
                value[:] = before
                continue
            value.update(before)  # first, so that no attribute is missing for another thread
            for name in value.keys() - before.keys():
                del value[name]
        for tensor, before, trained in self._tensors:
            tensor.data = before.to(tensor.device)
            tensor.grad = None
            tensor.detach_().requires_grad_(trained)


def _parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    yield module
    for child in module.children():
        if not isinstance(child, Stage):
            yield from _parts(child)


def _lists(module: torch.nn.Module) -> list[str]:
    lists = [name for name, part in module.named_modules() if isinstance(part, torch.nn.ParameterList)]
    return [name for name in lists if not name.startswith(ELSEWHERE)]
