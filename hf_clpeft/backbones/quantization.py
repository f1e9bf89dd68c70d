"""Quantisation of a backbone, named in a word or in JSON."""

import json
from importlib.util import find_spec
from typing import Any

from ..config.errors import ConfigError


NEEDED = {"int8": "torchao", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}  # libraries by name


def make_quantization(name: str) -> Any:
    """The `quantization_config` of [`load_backbone`] that a command line names.

    Args:
        name (`str`): `"int8"`, by torchao, on a CPU or a GPU; `"8bit"` or `"4bit"`, by bitsandbytes; or a
            configuration of `transformers` in JSON, whose `quant_method` names the library.

    Returns:
        `transformers.utils.quantization_config.QuantizationConfigMixin`

    Raises:
        [`ConfigError`]: There is no such quantisation, or its library is not installed.

    Example:

    ```py
    >>> from hf_clpeft.backbones.quantization import make_quantization

    >>> make_quantization("3bit")
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: quantization='3bit' is not int8, 8bit, 4bit, or a configuration in JSON.

    ```
    """
    if name not in NEEDED:
        return _from_json(name)
    if find_spec(NEEDED[name]) is None:
        raise ConfigError(f"quantization={name!r} needs {NEEDED[name]}; run `pip install {NEEDED[name]}`.")
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=name == "8bit", load_in_4bit=name == "4bit")


def _from_json(text: str) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"quantization={text!r} is not {', '.join(NEEDED)}, or a configuration in JSON.")
    try:
        return AutoQuantizationConfig.from_dict(values)
    except Exception as error:  # the configurations of libraries raise anything on unknown or missing values
        raise ConfigError(f"quantization={text}: transformers cannot use it ({error}).") from error
