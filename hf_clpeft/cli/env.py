"""`hf-clpeft env`: the environment, for bug reports."""

import os
import platform

from .common import AsJson, show


def env(as_json: AsJson = False) -> None:
    """Print versions, device and Hub settings for a bug report."""
    import torch
    from huggingface_hub import constants

    from ..reports.versions import library_versions

    show(
        {
            **library_versions(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "accelerator": torch.get_device_module().get_device_name() if torch.accelerator.is_available() else "none",
            "HF_ENDPOINT": constants.ENDPOINT,
            "HF_HUB_OFFLINE": constants.HF_HUB_OFFLINE,
            "HF_HOME": constants.HF_HOME,
        },
        as_json,
    )
