"""The last layer of a backbone for [CLS] alone: what it would compute for the other tokens is read by nobody.

A pre-norm layer of a transformer is x + attention(norm(x)), and y + mlp(norm'(y)) of that. Attention reads all tokens;
everything behind it treats each token by itself. So it is enough to let x be [CLS], norm read all tokens, and the
attention hand on its first output: about two thirds of the layer are saved, in both directions.
"""

import copy
from typing import Any, NamedTuple

import torch


class Parts(NamedTuple):
    """Names of modules in a layer.

    Args:
        norm (`str`): The norm in front of its attention.
        attention (`str`): The attention, with its output projection.
    """

    norm: str
    attention: str


class ForClassToken(torch.nn.Module):
    """Takes the place of a layer: returns its output for the first token, of shape `(batch, 1, hidden_size)`.

    Args:
        layer (`torch.nn.Module`): The layer, which is not modified.
        parts ([`Parts`]): From [`find_parts`].
    """

    def __init__(self, layer: torch.nn.Module, parts: Parts):
        super().__init__()
        self._layer, self._parts = layer, parts

    def forward(self, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Takes what the layer takes."""
        layer = shallow_copy(self._layer)  # of this call: threads share the layer
        norm, attention = (shallow_copy(layer.get_submodule(name)) for name in self._parts)
        norm.register_forward_pre_hook(lambda module, inputs: (tokens,))
        attention.register_forward_hook(lambda module, inputs, output: _first(output))
        layer._modules.update(zip(self._parts, (norm, attention), strict=True))
        return layer(tokens[:, :1], *args, **options)


def find_parts(layer: torch.nn.Module, tokens: torch.Tensor, *args: Any, **options: Any) -> Parts | None:
    """Finds norm and attention of a layer; `None` if its output for the first token is not that of [`ForClassToken`].

    Args:
        layer (`torch.nn.Module`): The layer.
        tokens (`torch.Tensor` of shape `(batch, tokens, hidden_size)`): Its input; the values do not matter.
        args, options: What else it is called with.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.backbones.last_layer import find_parts

    >>> layer = load_backbone("hf-clpeft/vit-tiny-glyphs").model.layers[-1]
    >>> find_parts(layer, torch.randn(1, 17, 128))
    Parts(norm='layernorm_before', attention='attention')

    ```
    """
    # A copy in float32, so that rounding is no difference.
    layer, tokens = copy.deepcopy(layer).float(), torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(layer.parameters()).device)
    called: list[tuple[str, Any, Any]] = []
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, named, output, name=name: called.append(
                (name, next(iter((*inputs, *named.values())), None), output)
            ),
            with_kwargs=True,
        )
        for name, module in layer.named_children()
    ]
    whole = _first(layer(tokens, *args, **options))
    for hook in hooks:
        hook.remove()
    (norm, read, normed), (attention, attended, _), *_ = called
    if read is not tokens or attended is not normed:
        return None
    parts = Parts(norm, attention)
    found = ForClassToken(layer, parts)(tokens, *args, **options)
    whole, found = (output[0] if isinstance(output, tuple) else output for output in (whole, found))
    return parts if found.shape == whole.shape and torch.allclose(found, whole, rtol=1e-4, atol=1e-5) else None


def shallow_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A module with the same weights and submodules, in which these can be replaced, and with hooks of its own."""
    duplicate = copy.copy(module)
    for name in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
        vars(duplicate)[name] = copy.copy(vars(module)[name])
    return duplicate


def _first(output: Any) -> Any:
    """The first token of a layer's output."""
    return (_first(output[0]), *output[1:]) if isinstance(output, tuple) else output[:, :1]
