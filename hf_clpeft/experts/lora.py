"""Batched LoRA: every image has its own experts, at the cost of a plain forward pass."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch.nn.functional import embedding

from ..backbones import Backbone
from ..backbones.tracing import tracing
from .calls import Call, active_call, attach_hook
from .expert import ADAPTER
from .table import ExpertTable


MAX_STACKED_RATIO = 2  # run stacked up to this ratio of all components to selected ones


Columns = Callable[[slice], torch.Tensor]


@dataclass(frozen=True)
class _Site:
    """A linear layer that experts adapt.

    Args:
        key (`str`): Its name in PEFT files.
        input (`int`): Index of its input tensor, shared by layers with the same input.
        position (`int`): Its index among those layers.
        down (`slice`): Columns of its A in the first part of the table.
        up (`slice`): Columns of its B in the second part of the table.
    """

    key: str
    input: int
    position: int
    down: slice
    up: slice


class LoraTable(ExpertTable):
    """LoRA experts as rank-one updates of all adapted layers, added to the outputs of these layers.

    For a linear map W, A and B of the experts selected for an image, and their scales s:

        y = x Wᵀ + Σ_e s_e (x A_eᵀ) B_eᵀ

    There are two exact ways to compute it, both without a loop over experts. *Gathered* indexes every image's own A
    and B and uses batched matrix products: its cost does not depend on the number of experts.
    *Stacked* multiplies by all experts and masks those that are not selected: plain matrix products, faster for a
    small pool. Layers with the same input, such as query and value, share one product with A.

    Args:
        backbone ([`Backbone`]): The frozen model. Hooks on its linear layers do nothing outside
            [`~LoraTable.selected`] and in other threads.
        layers (`dict[str, torch.nn.Linear]`): Adapted layers by their names in PEFT files.
        inputs (`list[list[str]]`): The same names in order of execution, grouped by input tensor.

    Source: LoRA, arXiv 2106.09685.
    """

    def __init__(self, backbone: Backbone, layers: dict[str, torch.nn.Linear], inputs: list[list[str]]):
        downs = sum(layer.in_features for layer in layers.values())
        super().__init__(downs + sum(layer.out_features for layer in layers.values()), backbone.device)
        self.sites: dict[str, _Site] = {}
        down = up = 0
        for number, keys in enumerate(inputs):
            for position, key in enumerate(keys):
                layer = layers[key]
                ends = down + layer.in_features, up + layer.out_features
                self.sites[key] = _Site(key, number, position, slice(down, ends[0]), slice(up, ends[1]))
                attach_hook(layer, key)
                down, up = ends
        self._num_down = downs
        self.inputs = [(len(keys), layers[keys[0]].in_features, self.sites[keys[0]].down.start) for keys in inputs]

    @classmethod
    def made_for(cls, backbone: Backbone, peft_model: PeftModel) -> "LoraTable | None":
        """A table for experts like that of a PEFT model on a twin; `None` unless it is plain LoRA on linear layers."""
        names = [name for name, module in peft_model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
        layers = {f"base_model.model.{name}": backbone.model.get_submodule(name) for name in names}
        config = peft_model.peft_config[ADAPTER]
        weights = sum(f".{ADAPTER}." in name for name, _ in peft_model.named_parameters())
        linear = {key: layer for key, layer in layers.items() if type(layer) is torch.nn.Linear}
        if not (_is_plain(config) and len(linear) == len(layers) and weights == 2 * len(layers)):
            return None
        inputs = _shared_inputs(backbone, peft_model, names)
        return cls(backbone, linear, inputs) if inputs else None

    def pack(self, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Converts an expert to components.

        Args:
            config (`peft.LoraConfig`): PEFT's configuration.
            tensors (`dict[str, torch.Tensor]`): State dict as PEFT saves it.

        Returns:
            `torch.Tensor` of shape `(r, width)` and the scale of the update.

        Raises:
            `ValueError`: It is not plain LoRA, or adapts other layers than those of this table.
        """
        if not _is_plain(config):
            raise ValueError("it is not plain LoRA of one rank.")
        expected = {}
        for site in self.sites.values():
            expected[f"{site.key}.lora_A.weight"] = (config.r, site.down.stop - site.down.start)
            expected[f"{site.key}.lora_B.weight"] = (site.up.stop - site.up.start, config.r)
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        wrong = sorted(key for key, _ in found.items() ^ expected.items())
        if wrong:
            raise ValueError(f"{wrong[0]} has shape {found.get(wrong[0])} and should have {expected.get(wrong[0])}.")
        downs = [tensors[f"{site.key}.lora_A.weight"] for site in self.sites.values()]
        ups = [tensors[f"{site.key}.lora_B.weight"].mT for site in self.sites.values()]
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        return torch.cat([*downs, *ups], dim=1), scale

    def unpack(self, components: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inverse of [`~LoraTable.pack`]."""
        tensors, (downs, ups) = {}, self._parts(components)
        for site in self.sites.values():
            tensors[f"{site.key}.lora_A.weight"] = downs[:, site.down].contiguous()
            tensors[f"{site.key}.lora_B.weight"] = ups[:, site.up].mT.contiguous()
        return tensors

    def form_for(self, selection: torch.Tensor, requested: str) -> str:
        """Chooses the form for a selection, unless one is requested."""
        if requested != "auto":
            return requested
        # One expert per image is always gathered, so that outputs stay bit-identical when the bank grows.
        if selection.dim() == 1:
            return "gathered"
        selected = selection.shape[1] * self.members.shape[1]
        return "stacked" if len(self.rows) - 1 <= MAX_STACKED_RATIO * selected else "gathered"

    def norms(self) -> torch.Tensor:
        """Frobenius norms ‖s B A‖ of all updates, of shape `(experts, layers)`, without computing the products."""
        numbers = self.members[: len(self)]
        down, up = self._parts(self.rows.detach()[numbers])
        up = up * self.scales[numbers][..., None]
        squares = []
        for site in self.sites.values():
            a, b = down[..., site.down], up[..., site.up]
            squares.append(((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2)))  # ‖B A‖² = tr(A Aᵀ Bᵀ B)
        return torch.stack(squares, dim=1).clamp(min=0).sqrt()

    def scaled(self, factors: torch.Tensor) -> torch.Tensor:
        """A copy of `rows` in which updates are multiplied by factors, differentiable in these.

        Args:
            factors (`torch.Tensor` of shape `(experts, layers)` or `(experts,)`): Factors of all experts; layers in
                the order of `sites`.
        """
        owners = torch.zeros(len(self.rows), dtype=torch.int64, device=self.rows.device)
        owners[self.members[: len(self)]] = torch.arange(len(self), device=owners.device)[:, None]
        down, up = self._parts(self.rows)
        by_layer = factors.reshape(len(self), -1).expand(-1, len(self.sites))[owners].split(1, dim=1)
        ups = [up[:, site.up] * factor for site, factor in zip(self.sites.values(), by_layer, strict=True)]
        return torch.cat([down, *ups], dim=1)

    def selected(
        self, selection: torch.Tensor, form: str, dtype: torch.dtype, rows: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Context manager: the backbone applies to every image its own experts; see [`~LoraTable.call_for`]."""
        return active_call(self.call_for(selection, form, dtype, rows))

    def call_for(
        self, selection: torch.Tensor, form: str, dtype: torch.dtype, rows: torch.Tensor | None = None
    ) -> Call:
        """What applies to every image its own experts while it is active.

        Args:
            selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Experts of each image.
            form (`str`): `"gathered"` or `"stacked"`.
            dtype (`torch.dtype`): Compute dtype of the backbone's linear layers.
            rows (`torch.Tensor`, *optional*): Taken in place of `self.rows`, for example [`~LoraTable.scaled`].
        """
        components = self.components(selection)
        scales = self.scales[components]
        rows = self.rows if rows is None else rows
        if form == "stacked":
            down, up = (part.to(dtype) for part in self._parts(rows))
            weights = scales.new_zeros(components.shape[0], rows.shape[0]).scatter_add(1, components, scales)
            return _Updating(self, lambda own: down[:, own], lambda own: up[:, own], weights[:, None, None].to(dtype))
        # `embedding` is several times as fast as rows[components] on a CPU.
        if _reads_by_layer(rows):
            down, up = self._parts(rows)
            return _Updating(
                self,
                lambda own: embedding(components, down[:, own]).to(dtype),
                lambda own: embedding(components, up[:, own]).mul_(scales[..., None]).to(dtype),
            )
        down, up = self._parts(embedding(components, rows))
        down, up = down.to(dtype), up.mul_(scales[..., None]).to(dtype)
        return _Updating(self, lambda own: down[..., own], lambda own: up[..., own])

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns of A, and those of B."""
        return rows[..., : self._num_down], rows[..., self._num_down :]


class _Updating:
    """A [`Call`] that applies to every image its own LoRA modules.

    Args:
        table ([`LoraTable`]): Defines the columns of each layer.
        downs (callable): Given columns, A of the selected components of shape `(batch, components, columns)`
            (gathered), or of all, of shape `(components, columns)` (stacked).
        ups (callable): B likewise, scaled if gathered.
        weights (`torch.Tensor` of shape `(batch, 1, 1, components)`, *optional*): Scales of all components if stacked.
    """

    def __init__(self, table: LoraTable, downs: Columns, ups: Columns, weights: torch.Tensor | None = None):
        self.table, self.downs, self.ups, self.weights = table, downs, ups, weights
        self.projected: torch.Tensor | None = None  # x Aᵀ, shared by layers with the same input

    def update(self, key: str, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Adds the updates of the selected experts to the output of a linear layer."""
        site = self.table.sites.get(key)
        if site is None:
            return None
        if site.position == 0:
            self.projected = self._project(site.input, args[0].to(output.dtype))
        assert self.projected is not None
        up = self.ups(site.up)
        rank = up.shape[-2]
        down = self.projected[..., site.position * rank : (site.position + 1) * rank]
        if self.weights is None:
            return output.baddbmm_(down, up)
        return output.view(-1, output.shape[-1]).addmm_(down.reshape(-1, rank), up).view_as(output)

    def _project(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """x Aᵀ for all layers with input x, of shape `(batch, tokens, layers * rank)`."""
        count, width, start = self.table.inputs[number]
        # Concatenates the A of these layers: a view for one layer or rank 1, else a small copy.
        down = self.downs(slice(start, start + count * width)).unflatten(-1, (count, width))
        down = down.transpose(-3, -2).flatten(-3, -2)
        if self.weights is None:
            return torch.bmm(x, down.mT)
        projected = torch.nn.functional.linear(x, down).unflatten(-1, (count, -1))
        return (projected * self.weights).flatten(-2)


def _reads_by_layer(rows: torch.Tensor) -> bool:
    """Whether each layer indexes its own columns when it runs, or all are indexed at once.

    On a CPU the columns of one layer are still in its cache when they are used. On a GPU, launching many small kernels
    costs more than the arithmetic; in training, adding up gradients of the whole table for each layer does.
    """
    return rows.device.type == "cpu" and not torch.is_grad_enabled() and not tracing()


def _is_plain(config: PeftConfig) -> bool:
    """Whether every layer has the same rank and scale, and the update is just B A."""
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        return False
    return not (config.use_dora or config.rank_pattern or config.alpha_pattern)


def _shared_inputs(backbone: Backbone, peft_model: PeftModel, names: list[str]) -> list[list[str]] | None:
    """Layer names in order of execution, grouped by input; `None` if an input is not `(batch, tokens, width)`.

    Recorded by hooks in one forward pass, as names differ between architectures.
    """
    seen: list[tuple[str, torch.Tensor]] = []
    base: Any = peft_model.get_base_model()
    hooks = [
        base.get_submodule(name).base_layer.register_forward_pre_hook(
            lambda module, args, key=f"base_model.model.{name}": seen.append((key, args[0]))
        )
        for name in names
    ]
    pixels = torch.zeros(2, *backbone.input_shape, dtype=backbone.model.dtype, device=backbone.device)
    try:
        with torch.no_grad():
            peft_model(pixel_values=pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(names) or any(x.dim() != 3 or len(x) != 2 for _, x in seen):
        return None
    inputs: list[list[str]] = []
    for i, (key, x) in enumerate(seen):
        if i and x is seen[i - 1][1]:
            inputs[-1].append(key)
        else:
            inputs.append([key])
    return inputs
