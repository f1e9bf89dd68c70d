"""Probes the outputs of a model with a forward pass on the meta device.

The meta device computes shapes only, without time or memory. So an image size, an architecture or an untrusted
configuration is tested before any weights are loaded, whatever the architecture names its modules.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from .attention import AttentionConfig, Update, intercept, sites


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Output shapes of a model for one image.

    Args:
        hidden_size (`int`): Size of a feature vector.
        feature_map (`bool`): Whether outputs are `(batch, hidden_size, height, width)` rather than tokens.
        num_layers (`int`): Number of consecutive layers of equal width; 1 if the model cannot be truncated.
        layers (`str`, *optional*): Name of the `ModuleList` of these layers.
        random (`str`, *optional*): Name of an operation that draws random numbers, if there is one.
        num_bytes (`int`): Size of the largest intermediate tensor in float32.
    """

    hidden_size: int
    feature_map: bool
    num_layers: int
    layers: str | None
    random: str | None
    num_bytes: int


class _OpRecorder(TorchDispatchMode):
    """Records operations that draw random numbers, and the size of the largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.random: str | None = None
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        # Attention is tagged as random because of its dropout, which is 0 here.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            self.random = str(func)
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.num_elements = max(self.num_elements, output.numel())
        return outputs


def probe(model: "PreTrainedModel", shape: tuple[int, int, int]) -> Layout:
    """Runs a forward pass on the meta device.

    Args:
        model (`transformers.PreTrainedModel`): Model on any device, including `meta`.
        shape (`tuple[int, int, int]`): Channels, height and width of an image.

    Returns:
        [`Layout`]

    Raises:
        `Exception`: Whatever the model raises for an image of that shape.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.backbones.probe import probe

    >>> probe(load_backbone("hf-clpeft/vit-tiny-glyphs").model, (3, 32, 32)).num_layers
    6

    ```
    """
    count, recorder = getattr(model.config, "num_hidden_layers", None), _OpRecorder()
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    seen: dict[str, list[tuple]] = {name: [] for name, _ in lists}
    hooks = [
        layer.register_forward_hook(lambda m, i, output, name=name: seen[name].append(_shape(output)))
        for name, layers in lists
        for layer in layers
    ]
    try:
        with recorder:
            output = _forward(model, shape)
    finally:
        for hook in hooks:
            hook.remove()
    whole = tuple(output.shape)
    if len(whole) not in (3, 4):
        raise ValueError(f"its output has shape {whole}, neither tokens nor a feature map")
    # The model can be truncated if all layers output the shape of its final output.
    truncatable = [name for name, shapes in seen.items() if len(whole) == 3 and shapes == [whole] * (count or 0)]
    layers, num_layers = (truncatable[0], count) if truncatable else (None, 1)
    width = whole[1 if len(whole) == 4 else 2]
    return Layout(width, len(whole) == 4, num_layers or 1, layers, recorder.random, 4 * recorder.num_elements)


def prompt_obstacle(model: "PreTrainedModel", shape: tuple[int, int, int]) -> str | None:
    """Why tokens cannot be inserted after [CLS] in the output of `model.embeddings`; `None` if they can.

    Args:
        model (`transformers.PreTrainedModel`): Model without an adapter.
        shape (`tuple[int, int, int]`): Channels, height and width of an image.
    """
    embeddings = getattr(model, "embeddings", None)
    if embeddings is None:
        return "it has no `embeddings` layer that outputs tokens"
    captured: list[Any] = []

    def insert(module: torch.nn.Module, inputs: tuple, tokens: Any) -> Any:
        captured.append(tokens)
        if isinstance(tokens, torch.Tensor) and tokens.dim() == 3:
            return torch.cat([tokens[:, :1], tokens[:, :1], tokens[:, 1:]], dim=1)
        return None

    hook = embeddings.register_forward_hook(insert)
    try:
        output = _forward(model, shape)
    except Exception as error:
        return f"its layers require a fixed number of tokens ({type(error).__name__})"
    finally:
        hook.remove()
    if not (captured and isinstance(captured[0], torch.Tensor) and captured[0].dim() == 3):
        return "its `embeddings` layer outputs more than tokens"
    if tuple(output.shape) != (1, captured[0].shape[1] + 1, captured[0].shape[2]):
        return "its layers change the number of tokens"
    return None


def prefix_obstacle(model: "PreTrainedModel", shape: tuple[int, int, int]) -> str | None:
    """Why keys and values cannot be put in front of those of every layer; `None` if they can.

    Args:
        model (`transformers.PreTrainedModel`): Model without an adapter.
        shape (`tuple[int, int, int]`): Channels, height and width of an image.
    """
    twin: Any = to_meta(model)
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def noting(number: int) -> Update:
        def update(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append((number, key, value))
            return torch.cat([key[:, :, :1], key], dim=2), torch.cat([value[:, :, :1], value], dim=2)

        return update

    layers = sites(twin)
    if not layers:
        return "its stages differ in width, so that they are not layers to choose among"
    for number, modules in enumerate(layers):
        for module in modules:
            module.config = AttentionConfig(module)  # type: ignore[assignment]  # a new one: others hear of no call
            intercept(module, noting(number))
    try:
        with torch.no_grad():
            pixel_values = torch.zeros(1, *shape, device="meta", dtype=model.dtype)
            output = twin(pixel_values=pixel_values).last_hidden_state
    except Exception as error:
        return f"its attention requires a fixed number of keys ({type(error).__name__})"
    if [number for number, _, _ in calls] != list(range(len(layers))):
        return "its layers do not use the attention interface of `transformers`, each of them once"
    for _, *states in calls:
        if any(state.dim() != 4 or state.shape[1] * state.shape[3] != output.shape[2] for state in states):
            return "its keys and values differ in width from its tokens"
    return None


def _forward(model: "PreTrainedModel", shape: tuple[int, int, int]) -> torch.Tensor:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    pixel_values = torch.zeros(1, *shape, device="meta", dtype=model.dtype)
    with torch.no_grad():
        return functional_call(model, on_meta, kwargs={"pixel_values": pixel_values}).last_hidden_state


def _shape(output: Any) -> tuple:
    output = output[0] if isinstance(output, tuple | list) else output
    return tuple(output.shape) if isinstance(output, torch.Tensor) else ()


def to_meta(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module on the meta device, without hooks; adapters on it take no memory."""
    twin = copy.copy(module)
    for name, value in vars(twin).items():
        if "_hooks" in name and isinstance(value, dict):
            twin.__dict__[name] = type(value)()
    twin.__dict__.pop("forward", None)  # one that was put around the module's own would run the module itself
    twin._parameters = {
        name: None if parameter is None else torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    twin._buffers = {name: None if buffer is None else buffer.to("meta") for name, buffer in module._buffers.items()}
    twin._modules = {name: None if child is None else to_meta(child) for name, child in module._modules.items()}
    return twin
