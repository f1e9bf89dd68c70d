"""Where one expert at a time runs as PEFT runs it: in training, or because it has no fused form."""

from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..backbones import Backbone
from .expert import ADAPTER, Expert, make_peft_model
from .twin import twin_of


class Stage(torch.nn.Module):
    """A PEFT model on a twin of the backbone, which it changes in place.

    Args:
        backbone ([`Backbone`]): The frozen model; nothing is done to it.
        config (`peft.PeftConfig`): Of the adapter, which is fresh.

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
    name: str | None  # of the expert that runs here

    def __init__(self, backbone: Backbone, config: PeftConfig):
        super().__init__()
        self.twin = twin_of(backbone)
        self._build(config)

    def put(self, expert: Expert) -> PeftModel:
        """Lets an expert run here, from now on.

        Raises:
            [`ExpertError`]: It does not fit the backbone.
        """
        if not self.takes(expert.config):
            self.peft_model.unload()
            self._build(expert.config)
        self.name = None  # in case that it does not fit
        expert.copy_to(self.peft_model)
        torch.clear_autocast_cache()  # autocast would go on with the weights of the expert before
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
        """Whether an adapter of this configuration fits into the PEFT model that is here."""
        ours, theirs = self.peft_model.peft_config[ADAPTER].to_dict(), config.to_dict()
        return all(value == theirs.get(name) for name, value in ours.items() if name not in _PROVENANCE)

    def forward(self, pixel_values: torch.Tensor, layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """Features under the expert; see [`Backbone.forward`]."""
        return self.twin(pixel_values, layers)

    def _build(self, config: PeftConfig) -> None:
        self.peft_model = make_peft_model(self.twin, config).to(self.twin.device)
        self.name = None


# Fields that say where an adapter comes from rather than what it looks like.
_PROVENANCE = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type", "auto_mapping"}
