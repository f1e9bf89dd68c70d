"""PEFT on a frozen vision backbone: experts, how they are stored, and the bank that runs them."""

from .bank import ExpertBank
from .expert import Expert, ExpertError
from .prompts import PromptTunedVisionModel


__all__ = ["Expert", "ExpertBank", "ExpertError", "PromptTunedVisionModel"]
