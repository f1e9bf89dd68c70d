"""Several experts in training, run in one pass over a mixed batch."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from .bank import ExpertBank
from .expert import ADAPTER, ExpertError
from .fused import make_table
from .stage import Stage


class SlotsTogether:
    """Features of images of several tasks, each with the expert of its own task, differentiable in all of them.

    Experts run gathered, as in an [`ExpertBank`]: at the price of one pass over as many images with one expert.

    Args:
        bank ([`ExpertBank`]): Where the experts are trained, one in its slot at a time.
        stage ([`Stage`]): One of them. All have the same configuration.

    Raises:
        [`ExpertError`]: Such experts have no fused form, or drop out values of their own at random.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft import ExpertBank, load_backbone
    >>> from hf_clpeft.experts.expert import make_peft_config
    >>> from hf_clpeft.experts.together import SlotsTogether

    >>> bank = ExpertBank(load_backbone("hf-clpeft/vit-tiny-glyphs"))
    >>> stages = []
    >>> for name in ("cats", "dogs"):
    ...     _ = bank.start(name, make_peft_config({"peft_type": "LORA", "r": 1}, bank.backbone))
    ...     stages.append(bank.slot)
    >>> together = SlotsTogether(bank, stages[0])
    >>> cats, dogs = together(stages, [torch.zeros(2, 3, 32, 32), torch.zeros(3, 3, 32, 32)])
    >>> cats.shape[0], dogs.shape[0]
    (2, 3)

    ```
    """

    def __init__(self, bank: ExpertBank, stage: Stage):
        self.bank = bank
        config: Any = stage.peft_model.peft_config[ADAPTER]
        table = make_table(bank.backbone, stage.peft_model)
        if table is None:
            raise ExpertError(
                f"Experts of {config.peft_type.value} cannot be trained together: that needs plain LoRA on linear "
                "layers, prompts or prefixes. Train them one after another (together=1)."
            )
        if getattr(config, "lora_dropout", 0):
            raise ExpertError(
                f"Experts with lora_dropout={config.lora_dropout} cannot be trained together, as each would drop "
                "other values out than alone. Set lora_dropout=0, or train them one after another (together=1)."
            )
        self.table = table

    def __call__(self, stages: Sequence[Stage], pixel_values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Computes features.

        Args:
            stages (sequence of [`Stage`]): The experts.
            pixel_values (sequence of `torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images of each.

        Returns:
            `list[torch.Tensor]`: Features `(batch, hidden_size)` of the images of each.
        """
        bank, table, device = self.bank, self.table, pixel_values[0].device
        packed = [table.pack(stage.peft_model.peft_config[ADAPTER], tensors_of(stage.peft_model)) for stage in stages]  # type: ignore[arg-type]
        while len(table) < len(stages):
            components, scale = packed[len(table)]
            table.append(torch.zeros_like(components), scale)
        blank = torch.zeros(1, packed[0][0].shape[1], device=device)
        rows = torch.cat([blank, *(components for components, _ in packed)])
        sizes = [len(pixels) for pixels in pixel_values]
        selection = torch.arange(len(stages)).repeat_interleave(torch.tensor(sizes)).to(device, non_blocking=True)
        images, trunk = torch.cat(list(pixel_values)), bank.trunk
        if trunk is not None and trunk.depth:
            below = [bank.backbone.below(pixels, trunk) for pixels in pixel_values]
            trunk.keep(images, below[0]._replace(tokens=torch.cat([hidden.tokens for hidden in below])))
        with table.selected(selection, "gathered", bank.compute_dtype(), rows):
            return list(bank.backbone(images, trunk=trunk).split(sizes))


def tensors_of(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """The trainable tensors of an adapter themselves, by the names under which PEFT saves copies of them."""
    config: Any = peft_model.peft_config[ADAPTER]
    if config.is_prompt_learning:
        encoder: Any = peft_model.prompt_encoder[ADAPTER]
        return {"prompt_embeddings": encoder.embedding.weight}
    named = peft_model.named_parameters()
    return {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in named if tensor.requires_grad}
