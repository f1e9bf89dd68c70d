"""All experts of a model, and how a batch runs through them when every image has its own."""

from collections.abc import Iterator

import torch
from peft import PeftConfig, PeftModel

from ..backbones import Backbone, cls_features
from .expert import ADAPTER, Expert, make_peft_model


class ExpertBank(torch.nn.Module):
    """All experts of a model on one backbone.

    The bank keeps experts at rest and has one slot in the backbone: a PEFT model into which the tensors of one expert
    at a time are copied. A batch of mixed experts runs *grouped*: one forward per expert present. That is exact for
    every PEFT technique, and adding an expert costs the same however many there are.

    Args:
        backbone ([`Backbone`]): The frozen model.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts import ExpertBank
    >>> from hf_clpeft.experts.expert import make_peft_config

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> bank = ExpertBank(backbone)
    >>> _ = bank.start("task-000", make_peft_config({"peft_type": "LORA", "r": 1}, backbone))
    >>> _ = bank.finish("task-000")
    >>> features = bank(torch.zeros(2, 3, 32, 32), torch.tensor([0, 0]))
    >>> torch.equal(features, bank.frozen(torch.zeros(2, 3, 32, 32)))  # a fresh LoRA adapter changes nothing
    True

    ```
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.experts: list[Expert] = []
        self.slot: PeftModel | None = None
        self._in_slot: Expert | None = None

    def __len__(self) -> int:
        return len(self.experts)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    def add(self, expert: Expert) -> None:
        """Adds a trained expert, after trying that it fits the backbone.

        Raises:
            [`ExpertError`]: It does not fit.
        """
        self._put(expert)
        self.experts.append(expert)

    def start(self, name: str, config: PeftConfig) -> PeftModel:
        """Puts an expert into the slot for training: the one of that name if there is one, else a fresh one.

        Returns:
            `peft.PeftModel`: Its trainable parameters are the expert's.
        """
        known = next((expert for expert in self.experts if expert.name == name), None)
        if known is None:
            self._make_slot(config)
        else:
            self._put(known)
        self._in_slot = None  # from here on the slot holds nothing that is at rest
        return self.slot

    def finish(self, name: str) -> Expert:
        """Copies the trained expert out of the slot into the bank, replacing one of the same name."""
        expert = self._in_slot = Expert.from_peft_model(name, self.slot)
        names = [known.name for known in self.experts]
        if name in names:
            self.experts[names.index(name)] = expert
        else:
            self.experts.append(expert)
        return expert

    def frozen(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[CLS] features of the backbone without any expert.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        if self.slot is None:
            return self.backbone(pixel_values)
        with self.slot.disable_adapter():
            return self.backbone(pixel_values)

    def forward(self, pixel_values: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        """[CLS] features with every image under its own expert.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            selection (integer `torch.Tensor` of shape `(batch,)`): Expert of each image.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        features = pixel_values.new_empty(len(pixel_values), self.backbone.hidden_size)
        for index in selection.unique().tolist():
            if self._in_slot is not self.experts[index]:
                self._put(self.experts[index])
            chosen = selection == index
            features[chosen] = cls_features(self.slot, pixel_values[chosen]).to(features.dtype)
        return features

    def _put(self, expert: Expert) -> None:
        if self.slot is None or not _alike(self.slot.peft_config[ADAPTER], expert.config):
            self._make_slot(expert.config)
        expert.copy_to(self.slot)
        self._in_slot = expert

    def _make_slot(self, config: PeftConfig) -> None:
        if self.slot is not None:
            self.slot.unload()
        self.slot = make_peft_model(self.backbone, config).to(self.backbone.device)
        self._in_slot = None


# Fields that say where an adapter comes from rather than what it looks like.
_PROVENANCE = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type", "auto_mapping"}


def _alike(config: PeftConfig, other: PeftConfig) -> bool:
    """Whether adapters of both configurations fit into the same slot."""
    return all(
        value == other.to_dict().get(name) for name, value in config.to_dict().items() if name not in _PROVENANCE
    )
