"""What `config.json` says, and the checks of what comes from a stranger."""

from .errors import ConfigError, HfClpeftError
from .model import CONFIG_NAME, BackboneConfig, ContinualConfig, MethodConfig, TaskConfig


__all__ = [
    "CONFIG_NAME",
    "BackboneConfig",
    "ConfigError",
    "ContinualConfig",
    "HfClpeftError",
    "MethodConfig",
    "TaskConfig",
]
