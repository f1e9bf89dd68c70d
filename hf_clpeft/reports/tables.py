"""Tables in the terminal."""

import re
from collections.abc import Sequence

from ..config.text import printable


NUMBER = re.compile(r"-?[\d.,]+( %)?|[–?]|")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence], caption: str | None = None) -> None:
    """Prints a table: numbers right-aligned, text left-aligned.

    Args:
        title (`str`): Heading.
        columns (sequence of `str`): Column headers.
        rows (sequence of sequences): Cells. Text is printed without markup, control characters escaped.
        caption (`str`, *optional*): Text below the table.

    Example:

    ```py
    >>> from hf_clpeft.reports.tables import print_table

    >>> print_table("two tasks", ["task", "images"], [["task-000", 120], ["task-001", 80]])
    two tasks
    task      images
    ────────────────
    task-000     120
    task-001      80

    ```
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for number, name in enumerate(columns):
        numeric = all(NUMBER.fullmatch(str(row[number])) for row in rows)
        table.add_column(Text(printable(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(value)) for value in row))  # no markup: class names are untrusted
    console = Console()
    if title:
        console.print(Text(printable(title), style="bold"))
    console.print(table)
    if caption:
        console.print(Text("\n" + "\n".join(map(printable, caption.split("\n")))))
