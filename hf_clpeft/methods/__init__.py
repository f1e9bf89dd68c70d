"""Ways to learn tasks one after another."""

from .presets import *  # noqa: F403
