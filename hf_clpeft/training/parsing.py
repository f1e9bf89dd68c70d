"""Parses command lines and YAML files into dataclasses; errors are one line that names the option."""

import json
import re
import sys
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..config.errors import ConfigError, OptionError, refusing_options


MOST_LISTED = 8  # choices, where one of them is suggested
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string_to_bool": "true or false",
    "mapping": 'a mapping in JSON, such as {"lora_dropout": 0.1}',
}


def number_or_word(text: str) -> int | str:
    """What an option of type `int | str` means, such as `5` or `auto`."""
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text


def mapping(text: str) -> dict:
    """What an option of type `dict` means: JSON. Raises `ValueError` if it is none, or no mapping."""
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("no mapping")
    return values


class OptionParser(HfArgumentParser):
    """A parser with an option per field of some dataclasses; abbreviations are not accepted.

    Fields of type `int | str` take a number or a word, those of type `dict` take JSON.

    Args:
        groups (tuple of dataclasses): The dataclasses; each field has a help text in its metadata.
        without (collection of `str`): Fields that are no options here, and keep their defaults.
        options: Further arguments of `argparse.ArgumentParser`.

    Raises:
        [`ConfigError`]: Two of them have a field of one name.

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

    def __init__(self, groups: tuple[type, ...], without: Collection[str] = (), **options: Any):
        hints = [(f.name, get_type_hints(group)[f.name]) for group in groups for f in fields(group)]
        self.names = [name for name, _ in hints if name not in without]
        twice = next((name for name, count in Counter(name for name, _ in hints).items() if count > 1), None)
        if twice is not None:
            titles = [group.__qualname__ for group in groups if twice in get_type_hints(group)]
            raise ConfigError(f"{' and '.join(titles)} both have an option {twice!r}; give one of them another name.")
        super().__init__(groups, allow_abbrev=False, **options)  # type: ignore[arg-type]  # a NewType of its own
        self.emptied: dict[str, None] = {}  # reset by a YAML file: no default of the benchmark
        self._may_be_none = {name for name, hint in hints if NoneType in get_args(hint)}
        self._mappings = {name for name, hint in hints if (get_origin(hint) or hint) is dict}
        for name, hint in hints:
            if name in self._mappings:
                self._option_string_actions[f"--{name}"].type = mapping
            elif {int, str} <= set(get_args(hint)):
                self._option_string_actions[f"--{name}"].type = number_or_word
        self._without = {f"--{name}" for name in without}
        for option in self._without:
            self._option_string_actions[option].help = SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Raises [`OptionError`], where `argparse` prints its usage and exits."""
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        if found := re.search(r": invalid (\w+) value: (.*)$", message):
            message = f"{message[: found.start()]}: {found[2]} is not {KINDS.get(found[1], found[1])}"
        elif found := re.search(r": Truthy value expected: got (.*) but expected one of", message):
            message = f"{message[: found.start()]}: {found[1]!r} is not {KINDS['string_to_bool']}"
        elif found := re.search(r": invalid choice: (.*) \(choose from (.*)\)$", message):
            allowed = [choice.strip().strip("'") for choice in found[2].split(",")]
            near = nearest(found[1].strip("'"), allowed)
            long = len(allowed) > MOST_LISTED and near.endswith("?")
            what = "does not exist" if long else f"is not one of {', '.join(allowed)}"
            raise OptionError(f"{message[: found.start()]}: {found[1]} {what}{near} See --help.")
        raise OptionError(f"{message.rstrip('.')}. See --help.")

    def given(self, argv: list[str]) -> Any:
        """Parses a command line into an `argparse.Namespace` of the options given.

        Raises:
            [`OptionError`]: An option does not exist, or a value has the wrong type.
        """
        namespace, rest = self.parse_known_args(argv)
        hidden = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in argv} & self._without
        for word in [*rest, *hidden]:
            name = word.partition("=")[0]
            if name.startswith("--"):
                known = [f"--{name}" for name in self.names]
                near = nearest(f"--{name[2:].replace('-', '_')}", known)
                raise OptionError(f"There is no option {name}{near} See --help.")
        if rest:
            raise OptionError(f"{rest[0]!r} does not belong to an option. See --help.")
        return namespace

    def named(self, argv: list[str]) -> set[str]:
        """Names of the options that stand on a command line, whatever their values."""
        words = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
        return {name for name in self.names if {name, f"no_{name}"} & words}

    def read(self, argv: list[str] | None = None) -> tuple:
        """Parses a command line into an instance of each dataclass, and a namespace of other options, if any.

        Args:
            argv (`list[str]`, *optional*): Default: `sys.argv[1:]`.

        Raises:
            [`OptionError`]: An option does not exist, or a value is not allowed.
        """
        argv = sys.argv[1:] if argv is None else argv
        self.given(argv)
        with refusing_options():
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)

    def words_of(self, path: str) -> list[str]:
        """Converts the options of a YAML file into command-line arguments.

        Args:
            path (`str`): A mapping of options. Empty values reset defaults of the benchmark.

        Raises:
            [`OptionError`]: The file cannot be read, an option does not exist, or a value is not allowed.
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
            elif isinstance(value, dict) and name in self._mappings:
                words.append(f"--{name}={json.dumps(value, default=str)}")
            elif value is None or isinstance(value, list | dict):
                shown = "nothing" if value is None else str(value)[:60]
                takes = "values" if several else "a mapping" if name in self._mappings else "a single value"
                raise OptionError(f"{path}: {name} is {shown}; it takes {takes}.")
            else:
                words += [f"--{name}", str(value)] if several else [f"--{name}={value}"]
        try:
            self.given(words)
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from error
        return words


def nearest(name: str, known: Iterable[object]) -> str:
    """The end of a message about an unknown name: `"; did you mean ...?"` if one is similar, else a full stop.

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
    """Reads a YAML file that is a mapping, by the safe loader; duplicate keys are errors.

    Raises:
        [`OptionError`]: The file does not exist, cannot be read, or is not a mapping.

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
        values = _UniqueKeyLoader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise OptionError(f"{path} is not valid YAML{where}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(values, dict | NoneType):
        raise OptionError(f"{path} does not hold a mapping of options, such as `seed: 1`, one per line.")
    return values or {}


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, of which YAML silently takes the last one."""

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
