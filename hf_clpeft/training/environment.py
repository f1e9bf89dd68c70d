"""Describes the environment of a run, to reproduce its numbers."""

import torch
from accelerate import Accelerator

from ..config.text import get_logger
from ..model import ContinualModel
from ..reports.versions import library_versions
from .arguments import ContinualTrainingArguments


logger = get_logger(__name__)


def describe_environment(
    model: ContinualModel, accelerator: Accelerator, args: ContinualTrainingArguments, before: dict
) -> dict:
    """Backbone, arguments, seed, versions and device of a run, JSON-serialisable.

    From the environment of a resumed run (`before`), it keeps the fingerprints of images, and warns about changed
    arguments.
    """
    device, arguments = accelerator.device, args.decisive()
    former, pictures = before.get("arguments"), before.get("pictures")
    if args.resume_from_checkpoint is not None and isinstance(former, dict) and model.config.tasks:
        changed = [name for name in arguments if former.get(name, arguments[name]) != arguments[name]]
        if changed and accelerator.is_main_process:
            told = ", ".join(f"{name}={former[name]!r}, not {arguments[name]!r}" for name in changed)
            logger.warning("The tasks that are learnt already were learnt with %s.", told)
    return {
        "backbone": vars(model.config.backbone),
        "quantization": _quantization_of(model),
        "seed": args.seed,
        "arguments": arguments,
        "pictures": pictures if isinstance(pictures, dict) else {},
        "versions": library_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def _quantization_of(model: ContinualModel) -> dict | None:
    """How the backbone is quantised, if it is."""
    chosen = getattr(getattr(model.backbone.model, "config", None), "quantization_config", None)
    return None if chosen is None else chosen.to_dict()
