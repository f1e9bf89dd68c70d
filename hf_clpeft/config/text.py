"""Text of strangers, fit for a terminal: names of classes, domains and methods come from whoever made a model.

An escape sequence in one of them could rename a window, hide a line or turn text around.
"""

import json
import logging
import math
import re


# Control characters, separators of lines and paragraphs, what turns text around or marks it unseen, lone surrogates.
_HARMFUL = (
    "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff"
)
_SIGNS = re.compile(f"[{_HARMFUL}]")
_SIGNS_IN_JSON = re.compile(f"(?!\n)[{_HARMFUL}]")
_BREAKS = re.compile(r"[^\S\r\n]*[\r\n]\s*")


def printable(text: object) -> str:
    r"""Text without anything that a terminal obeys rather than shows: it is spelt out.

    Args:
        text: What to show.

    Returns:
        `str`: In one line.

    Example:

    ```py
    >>> from hf_clpeft.config.text import printable

    >>> print(printable("caf\u00e9 \x1b[2J"))
    café \x1b[2J

    ```
    """
    return _SIGNS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), str(text))


def printable_json(text: str) -> str:
    r"""The same for JSON, which stays what it was to whoever reads it.

    Example:

    ```py
    >>> import json
    >>> from hf_clpeft.config.text import printable_json

    >>> text = json.dumps(["\x9b2J"], ensure_ascii=False)
    >>> print(printable_json(text), json.loads(printable_json(text)) == json.loads(text))
    ["\u009b2J"] True

    ```
    """
    return _SIGNS_IN_JSON.sub(lambda sign: json.dumps(sign[0])[1:-1], text)


def one_line(text: object) -> str:
    r"""Printable text of an error, whose lines become one.

    Example:

    ```py
    >>> from hf_clpeft.config.text import one_line

    >>> one_line("Does not fit:\n\tsize mismatch")
    'Does not fit: size mismatch'

    ```
    """
    return printable(_BREAKS.sub(" ", str(text)).strip())


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
    r"""The logger of a module that quotes strangers, in print.

    Example:

    ```py
    >>> from hf_clpeft.config.text import get_logger

    >>> get_logger("hf_clpeft.hub.push").name
    'hf_clpeft.hub.push'

    ```
    """
    logger = logging.getLogger(name)
    logger.addFilter(_spell_out)
    return logger


def _spell_out(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), ()
    return True
