"""Copies the experts of a model that has learnt the same tasks, instead of training them again."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..config import ConfigError
from ..model import ContinualModel


class Donor:
    """A model with one expert per task whose experts and head rows are copied to another model.

    Experts do not depend on the router, so that one training serves all routers and classifiers.

    Args:
        source (`str`): Folder or repo of the donor.
        model ([`ContinualModel`]): The model to copy to.

    Raises:
        [`ConfigError`]: The experts of the models have different PEFT options.
    """

    def __init__(self, source: str, model: ContinualModel):
        self.source, self.model = source, model
        self.donor = ContinualModel.from_pretrained(source, backbone=model.backbone)
        with self._named():
            model.method.accept(self.donor.method)

    def give(self, seconds: dict[str, float]) -> bool:
        """Copies the trained parameters of the current task.

        Args:
            seconds (`dict[str, float]`): Set to the donor's training time.

        Returns:
            `bool`: `False` if the donor has not learnt the task, so that it must be trained.

        Raises:
            [`ConfigError`]: The donor has learnt a task of this name with other classes, or its head differs.
        """
        tasks, task = self.donor.config.tasks, self.model.method.task
        names = [known.name for known in tasks]
        if task is None or task.name not in names:
            return False
        position = names.index(task.name)
        known = tasks[position]
        if (known.classes, known.domain) != (task.classes, task.domain):
            raise ConfigError(
                f"experts_from={self.source} has learnt {known.name} with the classes {known.classes} (domain "
                f"{known.domain}), not {task.classes} (domain {task.domain})."
            )
        with self._named():
            self.model.method.take(self.donor.method, position)
        if self.donor.report is not None and "train" in self.donor.report.seconds[position]:
            seconds["train"] = self.donor.report.seconds[position]["train"]
        return True

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Prefixes error messages with the donor."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"experts_from={self.source} {error}") from error
