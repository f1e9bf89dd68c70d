"""Command lines and YAML files into dataclasses; what cannot be meant is told in a line that names the option."""

import re
import sys
from collections.abc import Hashable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..config.errors import OptionError, refusing_options


KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


class OptionParser(HfArgumentParser):
    """Every field of some dataclasses an option, to be given in full.

    Args:
        groups (tuple of dataclasses): Whose fields; each has a help text in its metadata.

    Example:

    ```py
    >>> from hf_clpeft.training.options import BackboneArguments
    >>> from hf_clpeft.training.parsing import OptionParser

    >>> OptionParser((BackboneArguments,)).read(["--image_size", "32"])[0].image_size
    32
    >>> OptionParser((BackboneArguments,)).read(["--image_sise", "32"])
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.OptionError: There is no option --image_sise; did you mean --image_size? See --help.

    ```
    """

    def __init__(self, groups: tuple[type, ...]):
        super().__init__(groups, allow_abbrev=False)  # type: ignore[arg-type]  # a NewType that it does not export
        self.names = [f.name for group in groups for f in fields(group)]
        self.emptied: dict[str, None] = {}  # by a YAML file, whatever suits the benchmark
        hints = [hint for group in groups for hint in get_type_hints(group).items()]
        self._may_be_none = {name for name, hint in hints if NoneType in get_args(hint)}

    def error(self, message: str) -> NoReturn:
        """Raises [`OptionError`], where `argparse` prints all options and ends the program."""
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        if found := re.search(r": invalid (\w+) value: (.*)$", message):
            message = f"{message[: found.start()]}: {found[2]} is not {KINDS.get(found[1], found[1])}"
        elif found := re.search(r": Truthy value expected: got (.*) but expected one of", message):
            message = f"{message[: found.start()]}: {found[1]!r} is not {KINDS['string_to_bool']}"
        elif found := re.search(r": invalid choice: (.*) \(choose from (.*)\)$", message):
            allowed = [choice.strip().strip("'") for choice in found[2].split(",")]
            near = nearest(found[1].strip("'"), allowed)
            message = f"{message[: found.start()]}: {found[1]} is not one of {', '.join(allowed)}{near}"
        raise OptionError(f"{message}. See --help.")

    def given(self, argv: list[str]) -> Any:
        """What a command line says, as an `argparse.Namespace`.

        Raises:
            [`OptionError`]: There is no such option, or a value is of another type than the option's.
        """
        namespace, rest = self.parse_known_args(argv)
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--"):
                known = [option for option in self._option_string_actions if "-" not in option[2:]]
                near = nearest(f"--{name[2:].replace('-', '_')}", known)
                raise OptionError(f"There is no option {name}{near} See --help.")
        if rest:
            raise OptionError(f"{rest[0]!r} belongs to no option. See --help.")
        return namespace

    def read(self, argv: list[str] | None = None) -> tuple:
        """One instance of each dataclass, and a namespace of options that belong to none, if there are any.

        Args:
            argv (`list[str]`, *optional*): Default `sys.argv[1:]`.

        Raises:
            [`OptionError`]: There is no such option, or a value is not one of its own.
        """
        argv = sys.argv[1:] if argv is None else argv
        self.given(argv)
        with refusing_options():
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)

    def words_of(self, path: str) -> list[str]:
        """The options of a YAML file as words of a command line.

        Args:
            path (`str`): A mapping of options. Empty ones take back what suits the benchmark.

        Raises:
            [`OptionError`]: It cannot be read, there is no such option, or a value is not one of its own.
        """
        words = []
        for name, value in read_yaml(path).items():
            if name not in self.names:
                raise OptionError(f"{path}: there is no option {name!r}{nearest(str(name), self.names)} See --help.")
            several = self._option_string_actions[f"--{name}"].nargs == "+"
            if value is None and name in self._may_be_none:
                self.emptied[name] = None
            elif isinstance(value, list) and several and value:
                words += [f"--{name}", *map(str, value)]
            elif value is None or isinstance(value, list | dict):
                shown = "nothing" if value is None else str(value)[:60]
                raise OptionError(f"{path}: {name} is {shown}; it takes {'values' if several else 'a single value'}.")
            else:
                words += [f"--{name}", str(value)] if several else [f"--{name}={value}"]
        try:
            self.given(words)
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from error
        return words


def nearest(name: str, known: Iterable[object]) -> str:
    """The end of a sentence about a name that does not exist: `"; did you mean ...?"`, or a full stop.

    Example:

    ```py
    >>> from hf_clpeft.training.parsing import nearest

    >>> nearest("lerning_rate", ["learning_rate", "seed"])
    '; did you mean learning_rate?'
    >>> nearest("colour", ["learning_rate", "seed"])
    '.'

    ```
    """
    near = get_close_matches(name, [str(each) for each in known], n=1)
    return f"; did you mean {near[0]}?" if near else "."


def read_yaml(path: str | Path) -> dict:
    """A YAML file that is a mapping: plain values only, and no name twice.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        [`OptionError`]: It is not there, cannot be read, or is none.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from hf_clpeft.training.parsing import read_yaml

    >>> _ = Path("options.yaml").write_text("seed: 1")
    >>> read_yaml("options.yaml")
    {'seed': 1}

    ```
    """
    try:
        values = _OnceLoader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise OptionError(f"{path} is no YAML{where}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(values, dict | NoneType):
        raise OptionError(f"{path} holds no mapping of options, such as `seed: 1`, one in a line.")
    return values or {}


class _OnceLoader(yaml.SafeLoader):
    """Where a mapping has a name twice, YAML takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value.__hash__ is not None:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)
