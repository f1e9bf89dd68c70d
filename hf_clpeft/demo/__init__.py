"""The Gradio demo: which expert takes a picture, and why."""

import os


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

from .app import LAUNCH, build_demo


__all__ = ["LAUNCH", "build_demo"]
