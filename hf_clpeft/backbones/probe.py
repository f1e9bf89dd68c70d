"""What a model makes of a picture, found out without computing anything.

A forward pass on the `meta` device knows all shapes and takes neither time nor memory. So a size, a family or a
stranger's configuration is tried before there are weights, whatever the architecture names its parts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """What a model gives for one picture.

    Args:
        hidden_size (`int`): Width of a feature.
        places (`bool`): The output is `(batch, hidden_size, height, width)`, rather than a row of tokens.
        num_layers (`int`): Layers of one width that follow each other; 1 where it cannot be cut into such.
        layers (`str`, *optional*): Name of their list.
        random (`str`, *optional*): An operation that draws random numbers.
        num_bytes (`int`): The largest tensor on the way, in float32.
    """

    hidden_size: int
    places: bool
    num_layers: int
    layers: str | None
    random: str | None
    num_bytes: int


class _Watch(TorchDispatchMode):
    """Sees every operation: which draw random numbers, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.random: str | None = None
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        # Attention counts as random for the sake of its dropout, which is 0 here.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            self.random = str(func)
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.num_elements = max(self.num_elements, output.numel())
        return outputs


def probe(model: "PreTrainedModel", shape: tuple[int, int, int]) -> Layout:
    """Runs a model without computing anything.

    Args:
        model (`transformers.PreTrainedModel`): On any device, `meta` included.
        shape (`tuple[int, int, int]`): Channels, height and width of a picture.

    Returns:
        [`Layout`]

    Raises:
        `Exception`: Whatever the model raises on a picture of that shape.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.backbones.probe import probe

    >>> probe(load_backbone("hf-clpeft/vit-tiny-glyphs").model, (3, 32, 32)).num_layers
    6

    ```
    """
    count, watch = getattr(model.config, "num_hidden_layers", None), _Watch()
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    seen: dict[str, list[tuple]] = {name: [] for name, _ in lists}
    hooks = [
        layer.register_forward_hook(lambda m, i, output, name=name: seen[name].append(_shape(output)))
        for name, layers in lists
        for layer in layers
    ]
    try:
        with watch:
            output = _forward(model, shape)
    finally:
        for hook in hooks:
            hook.remove()
    whole = tuple(output.shape)
    if len(whole) not in (3, 4):
        raise ValueError(f"its output has the shape {whole}, and neither tokens nor places")
    # Layers that keep the shape of what comes out at the end can be cut off.
    alike = [name for name, shapes in seen.items() if len(whole) == 3 and shapes == [whole] * (count or 0)]
    layers, num_layers = (alike[0], count) if alike else (None, 1)
    places = len(whole) == 4
    return Layout(whole[1 if places else 2], places, num_layers or 1, layers, watch.random, 4 * watch.num_elements)


def why_no_prompt(model: "PreTrainedModel", shape: tuple[int, int, int]) -> str | None:
    """Why a token cannot be put behind the first one that a model's `embeddings` give; `None` if it can.

    Args:
        model (`transformers.PreTrainedModel`): Without an adapter.
        shape (`tuple[int, int, int]`): Channels, height and width of a picture.
    """
    embeddings = getattr(model, "embeddings", None)
    if embeddings is None:
        return "it has no `embeddings` layer that gives tokens"
    given: list[Any] = []

    def insert(module: torch.nn.Module, inputs: tuple, tokens: Any) -> Any:
        given.append(tokens)
        if isinstance(tokens, torch.Tensor) and tokens.dim() == 3:
            return torch.cat([tokens[:, :1], tokens[:, :1], tokens[:, 1:]], dim=1)
        return None

    hook = embeddings.register_forward_hook(insert)
    try:
        output = _forward(model, shape)
    except Exception as error:
        return f"its layers take no more tokens than a picture has ({type(error).__name__})"
    finally:
        hook.remove()
    if not (given and isinstance(given[0], torch.Tensor) and given[0].dim() == 3):
        return "its `embeddings` layer does not give tokens alone"
    if tuple(output.shape) != (1, given[0].shape[1] + 1, given[0].shape[2]):
        return "its layers do not keep the tokens that they are given"
    return None


def _forward(model: "PreTrainedModel", shape: tuple[int, int, int]) -> torch.Tensor:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    nowhere = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    pixel_values = torch.zeros(1, *shape, device="meta", dtype=model.dtype)
    with torch.no_grad():
        return functional_call(model, nowhere, kwargs={"pixel_values": pixel_values}).last_hidden_state


def _shape(output: Any) -> tuple:
    output = output[0] if isinstance(output, tuple | list) else output
    return tuple(output.shape) if isinstance(output, torch.Tensor) else ()
