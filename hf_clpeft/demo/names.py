"""What the page calls tasks, experts and classes. All of these names come from whoever made the model."""

from html import escape
from typing import NamedTuple

from ..config import TaskConfig
from ..config.text import printable
from ..model import ContinualModel


MOST_NAMED = 12  # classes in a tooltip


class Name(NamedTuple):
    """What the page calls an expert.

    Args:
        short (`str`): Its number in order of learning, such as "Task 2"; or its own name in a pool.
        about (`str`): The domain or the first classes of its task; empty in a pool.
        whole (`str`): As `about`, with many more classes, for tooltips.

    Example:

    ```py
    >>> from hf_clpeft.demo.names import Name

    >>> Name("Task 2", "cat, <b>", "cat, <b>").html()
    '<b>Task 2</b> <bdi title="cat, &lt;b&gt;">cat, &lt;b&gt;</bdi>'
    >>> print(Name("Task 2", "cat, dog", "cat, dog"))
    Task 2 (cat, dog)

    ```
    """

    short: str
    about: str
    whole: str

    def html(self) -> str:
        """Both, as HTML; the classes left out are in a tooltip."""
        about = f' <bdi title="{escape(self.whole)}">{escape(self.about)}</bdi>' if self.about else ""
        return f"<b>{escape(self.short)}</b>{about}"

    def __str__(self) -> str:
        return f"{self.short} ({self.about})" if self.about else self.short


def bdi(text: str) -> str:
    """A stranger's name as HTML: escaped, and unable to turn the direction of the text around it."""
    return f"<bdi>{escape(text)}</bdi>"


def task_names(model: ContinualModel) -> list[Name]:
    """What the tasks of a model are called, in the order in which they were learnt."""
    return [Name(f"Task {number}", task.title, _whole(task)) for number, task in enumerate(model.config.tasks, 1)]


def expert_names(model: ContinualModel) -> dict[str, Name]:
    """What the experts of a model are called, by name; its tasks, where no expert reads."""
    of_tasks = {task.name: name for task, name in zip(model.config.tasks, task_names(model), strict=True)}
    experts = model.bank.names if model.method.reads else of_tasks
    return {name: of_tasks.get(name, Name(printable(name), "", "")) for name in experts}


def _whole(task: TaskConfig) -> str:
    if task.domain is not None:
        return task.title
    more = f" and {len(task.classes) - MOST_NAMED} more" if len(task.classes) > MOST_NAMED else ""
    return printable(", ".join(task.classes[:MOST_NAMED])) + more
