"""The kinds of tables in which experts run fused."""

from typing import Any

from peft import PeftModel, PeftType

from ..backbones import Backbone
from .expert import ADAPTER
from .lora import LoraTable
from .prefix import PrefixTable
from .prompts import PromptTable


FusedTable = LoraTable | PromptTable | PrefixTable


def make_table(backbone: Backbone, peft_model: PeftModel) -> FusedTable | None:
    """An empty table for experts like that of a PEFT model on a twin of the backbone; `None` if they have none."""
    config: Any = peft_model.peft_config[ADAPTER]
    if config.peft_type == PeftType.PREFIX_TUNING:
        return PrefixTable(backbone, config)
    if config.is_prompt_learning:
        return PromptTable(backbone)
    return LoraTable.made_for(backbone, peft_model)
