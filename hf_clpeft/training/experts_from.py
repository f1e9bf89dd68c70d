"""Experts of a model that has learnt the same tasks, taken over in place of training the same ones again."""

import torch

from ..config.errors import ConfigError
from ..methods.learners import ExpertLearner, TaskLearner
from ..model import ContinualModel


class Donor:
    """A model with one expert per task that gives its experts and head rows to another.

    They do not depend on the router, so that one training serves all routers and all ways to classify.

    Args:
        source (`str`): Folder or repo of the model that gives.
        model ([`ContinualModel`]): The model that takes.

    Raises:
        [`ConfigError`]: Their experts are not made alike.
    """

    def __init__(self, source: str, model: ContinualModel):
        self.source, self.model = source, model
        self.donor = ContinualModel.from_pretrained(source, backbone=model.backbone)
        gives, takes = self.donor.config.method, model.config.method
        if gives.experts != "per_task" or takes.experts not in ("per_task", "first"):
            raise ConfigError(f"experts_from={source}: {takes.name} cannot take experts of {gives.name}.")
        for name in ("peft", "mask_logits"):
            given, wanted = getattr(gives, name), getattr(takes, name)
            if given != wanted:
                raise ConfigError(f"experts_from={source} was made with {name}={given!r}, not {wanted!r}.")

    def give(self, learner: TaskLearner, seconds: dict[str, float]) -> bool:
        """Fills what a task would train.

        Args:
            learner ([`TaskLearner`]): Of the model that takes.
            seconds (`dict[str, float]`): Gets the time that training took the giver.

        Returns:
            `bool`: Whether there was something to give; otherwise it must be trained.

        Raises:
            [`ConfigError`]: The giver has learnt a task of this name with other classes, or its head differs.
        """
        tasks, config = self.donor.config.tasks, learner.config
        names = [task.name for task in tasks]
        if config.name not in names or not isinstance(learner, ExpertLearner):
            return False
        position = names.index(config.name)
        known = tasks[position]
        if (known.classes, known.domain) != (config.classes, config.domain):
            raise ConfigError(
                f"experts_from={self.source} has learnt {known.name} with the classes {known.classes} (domain "
                f"{known.domain}), not {config.classes} (domain {config.domain})."
            )
        rows, seen = self.donor.heads, set(config.classes) & set(self.model.config.classes)
        numbers = [self.donor.config.classes.index(label) for label in config.classes]
        if rows.classes[position] != numbers or (seen and rows.shared != self.model.heads.shared):
            raise ConfigError(
                f"experts_from={self.source} has another head, of which rows of {known.name} were trained by other "
                "tasks too. Choose the same head."
            )
        self.donor.bank[position].copy_to(learner.peft_model)
        with torch.no_grad():
            learner.head.weight.copy_(rows.weights[position])
            learner.head.bias.copy_(rows.biases[position])
        if self.donor.report is not None and "train" in self.donor.report.seconds[position]:
            seconds["train"] = self.donor.report.seconds[position]["train"]
        return True
