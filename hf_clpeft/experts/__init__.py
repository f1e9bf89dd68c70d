"""PEFT on a frozen vision backbone: experts, their files, and the bank that runs them in batches."""

from .bank import ExpertBank
from .expert import Expert, ExpertError, make_peft_config
from .prefix import PrefixTunedVisionModel
from .prompts import PromptTunedVisionModel


__all__ = [
    "Expert",
    "ExpertBank",
    "ExpertError",
    "PrefixTunedVisionModel",
    "PromptTunedVisionModel",
    "make_peft_config",
]
