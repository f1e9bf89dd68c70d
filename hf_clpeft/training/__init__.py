"""The loop over tasks on Accelerate: arguments, trainer, evaluation, and what a run leaves behind."""

from .arguments import ContinualTrainingArguments
from .processes import TrainingError
from .trainer import ContinualTrainer


__all__ = ["ContinualTrainer", "ContinualTrainingArguments", "TrainingError"]
