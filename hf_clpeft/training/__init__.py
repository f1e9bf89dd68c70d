"""The loop over tasks: training, evaluation, checkpoints, and what a user hooks into it."""

from .arguments import ContinualTrainingArguments
from .callbacks import TrainerCallback
from .processes import TrainingError
from .trainer import ContinualTrainer


__all__ = ["ContinualTrainer", "ContinualTrainingArguments", "TrainerCallback", "TrainingError"]
