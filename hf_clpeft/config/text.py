"""Untrusted text made safe for the terminal: names of classes, domains and methods come from whoever made a model.

An escape sequence in one of them could retitle the window, hide a line or reverse the text.
"""

import json
import logging
import math
import re


# Control characters, line and paragraph separators, bidirectional and invisible characters, lone surrogates.
_RANGES = (
    "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff"
)
_UNSAFE = re.compile(f"[{_RANGES}]")
_UNSAFE_IN_JSON = re.compile(f"(?!\n)[{_RANGES}]")
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also of full width
_BREAKS = re.compile(r"[^\S\r\n]*[\r\n]\s*")


def printable(text: object) -> str:
    r"""Text whose control characters are escaped, so that a terminal shows them instead of obeying them, in one line.

    Example:

    ```py
    >>> from hf_clpeft.config.text import printable

    >>> print(printable("caf\u00e9 \x1b[2J"))
    café \x1b[2J

    ```
    """
    return _UNSAFE.sub(lambda char: char[0].encode("unicode_escape").decode(), str(text))


def printable_json(text: str) -> str:
    r"""JSON whose control characters are escaped; it parses to the same values.

    Example:

    ```py
    >>> import json
    >>> from hf_clpeft.config.text import printable_json

    >>> text = json.dumps(["\x9b2J"], ensure_ascii=False)
    >>> print(printable_json(text), json.loads(printable_json(text)) == json.loads(text))
    ["\u009b2J"] True

    ```
    """
    return _UNSAFE_IN_JSON.sub(lambda char: json.dumps(char[0])[1:-1], text)


def one_line(text: object) -> str:
    r"""Printable text, with its lines joined into one.

    Example:

    ```py
    >>> from hf_clpeft.config.text import one_line

    >>> one_line("Does not fit:\n\tsize mismatch")
    'Does not fit: size mismatch'

    ```
    """
    return printable(_BREAKS.sub(" ", str(text)).strip())


def csv_text(text: str) -> str:
    """Text for a cell of a CSV: after an apostrophe, if a spreadsheet would take it for a formula, and run it.

    Names come from whoever made a model or a file.

    Example:

    ```py
    >>> from hf_clpeft.config.text import csv_text

    >>> csv_text("=1+1"), csv_text("7.png")
    ("'=1+1", '7.png')

    ```
    """
    return f"'{text}" if text.lstrip(" \n\ufeff").startswith(FORMULAS) else text


def percent(value: float, digits: int = 1, unit: str = " %") -> str:
    """A fraction in percent; a dash for NaN, which was not measured.

    Example:

    ```py
    >>> from hf_clpeft.config.text import percent

    >>> percent(0.1234), percent(0.1234, digits=0, unit=""), percent(float("nan"))
    ('12.3 %', '12', '–')

    ```
    """
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}{unit}"


def get_logger(name: str) -> logging.Logger:
    """A module's logger that makes every message a printable single line.

    Example:

    ```py
    >>> from hf_clpeft.config.text import get_logger

    >>> get_logger("hf_clpeft.hub.push").name
    'hf_clpeft.hub.push'

    ```
    """
    logger = logging.getLogger(name)
    logger.addFilter(_escape)
    return logger


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), ()
    return True
