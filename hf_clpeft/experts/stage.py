"""Runs one expert at a time as a plain PEFT model: for training, or if it has no fused form."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..backbones import Backbone
from ..backbones.trunk import Trunk
from .calls import Call, active_call
from .expert import ADAPTER, Expert, make_peft_model
from .prefix import layers_of
from .twin import twin_of


class Stage(torch.nn.Module):
    """A PEFT model on a twin of the backbone, which PEFT modifies in place.

    Args:
        backbone ([`Backbone`]): The frozen model, which is not modified.
        config (`peft.PeftConfig`): Configuration of the new adapter.

    Raises:
        [`ExpertError`]: PEFT cannot use the configuration on this backbone.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.expert import make_peft_config
    >>> from hf_clpeft.experts.stage import Stage

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> stage = Stage(backbone, make_peft_config({"peft_type": "LORA", "r": 1}, backbone))
    >>> torch.equal(stage(torch.zeros(1, 3, 32, 32)), backbone(torch.zeros(1, 3, 32, 32)))
    True

    ```
    """

    peft_model: PeftModel
    name: str | None  # of the loaded expert

    def __init__(self, backbone: Backbone, config: PeftConfig):
        super().__init__()
        self.twin = twin_of(backbone)
        self._build(config)

    def put(self, expert: Expert) -> PeftModel:
        """Loads an expert in place of the current one.

        Raises:
            [`ExpertError`]: It does not fit the backbone.
        """
        if not self.takes(expert.config):
            self.peft_model.unload()
            self._build(expert.config)
        self.name = None  # in case it does not fit
        expert.copy_to(self.peft_model)
        torch.clear_autocast_cache()  # autocast caches casts of the previous weights
        self.name = expert.name
        return self.peft_model

    def train(self, mode: bool = True) -> "Stage":
        """Keeps the backbone in evaluation mode: it is frozen, with its dropout and the statistics of its norms."""
        super().train(False)
        for layer in self.peft_model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.training = mode
                for name, part in layer.named_children():
                    part.train(mode and name != "base_layer")
        return self

    def takes(self, config: PeftConfig) -> bool:
        """Whether an adapter with this configuration can be loaded without rebuilding the PEFT model."""
        ours, theirs = self.peft_model.peft_config[ADAPTER].to_dict(), config.to_dict()
        return all(value == theirs.get(name) for name, value in ours.items() if name not in _PROVENANCE)

    def forward(
        self,
        pixel_values: torch.Tensor,
        layers: int | Sequence[int] | None = None,
        trunk: Trunk | None = None,
        call: Call | None = None,
    ) -> torch.Tensor:
        """Features with the expert applied; see [`Backbone.forward`].

        Args:
            call ([`Call`], *optional*): Active beside it. It is activated here, as a compiled forward pass does not
                notice one that was activated around it.
        """
        with nullcontext() if call is None else active_call(call):
            return self.twin(pixel_values, layers, trunk)

    def _build(self, config: PeftConfig) -> None:
        self.depth = 0  # first layers that the expert leaves alone
        self.peft_model = make_peft_model(self.twin, config).to(self.twin.device)
        self.depth, self.name = self._find_depth(config), None

    def _find_depth(self, config: Any) -> int:
        if config.peft_type == PeftType.PREFIX_TUNING:
            place, count = self.twin.layout.layers, self.twin.num_layers
            return self.twin.depth_below(f"{place}.{number}" for number in layers_of(config, count))
        if config.is_prompt_learning:
            return 0
        modules = self.peft_model.get_base_model().named_modules()
        return self.twin.depth_below(name for name, module in modules if isinstance(module, BaseTunerLayer))


# Fields that describe the origin of an adapter rather than its architecture.
_PROVENANCE = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type", "auto_mapping"}
