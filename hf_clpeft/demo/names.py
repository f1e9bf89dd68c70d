"""What the page calls tasks, experts and classes. All of these names come from whoever made the model."""

import re
import unicodedata
from html import escape
from typing import NamedTuple

from ..config import TaskConfig
from ..config.text import printable
from ..model import ContinualModel
from .pictures import VisitorError


MOST_NAMED = 12  # classes in a tooltip
LONGEST = 40  # characters of a class
SEPARATORS = "/\\<>"  # of folders and of tags
BLANKS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks that nobody sees
JOINERS = "\u200c\u200d"  # with which scripts of India and Persia, and emoji, are written
A_NAME = (
    f"Give the class a name of 1 to {LONGEST} letters, digits, signs or emoji, or put the pictures into a folder of "
    "that name."
)


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


def class_name(text: str) -> str:
    r"""The name of a class as it is learnt: in one line, and its accents composed, as not all computers write them.

    Example:

    ```py
    >>> from hf_clpeft.demo.names import class_name

    >>> class_name(" Ka\u0308fer  (grün) ")
    'Käfer (grün)'

    ```
    """
    return unicodedata.normalize("NFC", " ".join(text.split()))


def check_class_name(name: str, folder: bool = False) -> None:
    """Checks that a class can have a name, which will stand in tables, in files and on the Hub.

    Args:
        name (`str`): As [`class_name`] gives it.
        folder (`bool`, *optional*, defaults to `False`): Whether it is that of a folder of pictures.

    Raises:
        [`VisitorError`]: It is empty, too long, without anything to be read, or has a character that is invisible,
            turns the direction of text or separates folders.

    Example:

    ```py
    >>> from hf_clpeft.demo.names import VisitorError, check_class_name

    >>> check_class_name("C# 🐈")
    >>> try:
    ...     check_class_name("cat/dog")
    ... except VisitorError as error:
    ...     print(str(error)[:62])
    'cat/dog' cannot be the name of a class: it has '/' (SOLIDUS).

    ```
    """
    if not name:
        raise VisitorError(A_NAME)
    what = f"{'The folder ' if folder else ''}{name[: LONGEST + 1]!r} cannot be the name of a class"
    for place, character in enumerate(name):
        if not _is_allowed(character, name[place - 1 : place], name[place + 1 : place + 2]):
            about = unicodedata.name(character, f"U+{ord(character):04X}")
            raise VisitorError(f"{what}: it has {character!r} ({about}). {A_NAME}")
    if len(name) > LONGEST:
        raise VisitorError(f"{what}: it has {len(name)} characters. {A_NAME}")
    if unicodedata.category(name[0])[0] == "M" or (name.isascii() and not re.search(r"[^\W_]", name)):
        raise VisitorError(f"{what}: it has nothing that can be read, or begins with an accent. {A_NAME}")


def _is_allowed(character: str, before: str, after: str) -> bool:
    """Whether a character is printed as itself."""
    if character in JOINERS:  # between letters that they change; elsewhere nobody sees them
        return bool(before and after) and not before.isascii() and not after.isascii() and before not in JOINERS
    kind = unicodedata.category(character)
    return character == " " or (kind[0] in "LMNPS" and character not in SEPARATORS + BLANKS)
