"""The Gradio demo: which expert classifies a picture, and why."""

import os


# Read when gradio is imported. No telemetry, and no statistics over all past requests, which slow every new one down.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**12))
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")

from .app import build_demo, launch_options


__all__ = ["build_demo", "launch_options"]
