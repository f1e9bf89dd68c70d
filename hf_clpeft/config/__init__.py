"""What `config.json` says, and the checks of what comes from a stranger."""

from .errors import ConfigError, HfClpeftError
from .method import MethodOptions, read_options
from .model import CONFIG_NAME, BackboneConfig, ContinualConfig, TaskConfig


__all__ = [
    "CONFIG_NAME",
    "BackboneConfig",
    "ConfigError",
    "ContinualConfig",
    "HfClpeftError",
    "MethodOptions",
    "TaskConfig",
    "read_options",
]
