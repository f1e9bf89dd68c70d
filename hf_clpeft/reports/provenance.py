"""How a model was made, from its report, which may be anybody's: only values of known names and kinds are told."""

import math
from typing import Any

from ..config.text import percent, printable
from .report import StreamReport


TRAINED_WITH = (
    *("num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "head_learning_rate"),
    *("optim", "weight_decay", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "augmentation"),
)
LONGEST = 60  # characters of a value


def made_how(report: StreamReport, trains: bool = True) -> dict[str, str]:
    """What a card says of the making of a model, by name; what is not known is left out.

    Args:
        report ([`StreamReport`]): Its report.
        trains (`bool`, *optional*, defaults to `True`): Whether its method trains with an optimizer.

    Example:

    ```py
    >>> from hf_clpeft import StreamReport
    >>> from hf_clpeft.reports.provenance import made_how

    >>> environment = {"arguments": {"learning_rate": 0.005}, "seed": 0, "device": "cpu"}
    >>> made_how(StreamReport("s_lora", "pets", environment))
    {'training': 'learning_rate = 0.005, seed = 0', 'hardware': 'cpu, 1 process'}

    ```
    """
    told = report.environment
    arguments, versions, quantized = (_mapping(told.get(name)) for name in ("arguments", "versions", "quantization"))
    names = TRAINED_WITH if trains else ()
    training = [f"{name} = {_value(arguments[name])}" for name in names if _known(arguments.get(name))]
    training += [f"seed = {_value(told['seed'])}"] if _known(told.get("seed")) else []
    hardware = []
    if _known(told.get("device")):
        count = told.get("num_processes")
        count = count if isinstance(count, int) and count > 1 else 1
        hardware = [_value(told["device"]), f"{count} process{'es' * (count > 1)}"]
        if told.get("mixed_precision") not in (None, "no") and _known(told.get("mixed_precision")):
            hardware.append(f"mixed precision {_value(told['mixed_precision'])}")
        if _known(quantized.get("quant_method")):
            hardware.append(f"backbone quantised by {_value(quantized['quant_method'])}")
    found = {
        "training": ", ".join(training),
        "hardware": ", ".join(hardware),
        "time": _time(report),
        "versions": ", ".join(f"{_value(name)} {_value(each)}" for name, each in versions.items() if _known(each)),
        "calibration": _calibration(report),
    }
    return {name: text for name, text in found.items() if text}


def _time(report: StreamReport) -> str:
    """Wall-clock time of all tasks, in all and by part."""
    parts: dict[str, float] = {}
    for of_task in report.seconds:
        for name, value in _mapping(of_task).items():
            if isinstance(value, int | float) and math.isfinite(value):
                parts[name] = parts.get(name, 0.0) + value
    told = [f"{_value(name).replace('_', ' ')} {value:,.1f}" for name, value in parts.items() if value >= 0.05]
    return f"{sum(parts.values()):,.1f} s in all: {', '.join(told)}" if told else ""


def _calibration(report: StreamReport) -> str:
    told = [] if report.temperature is None else [f"temperature {report.temperature:.3g}"]
    error = report.summary().get("calibration_error")
    told += [] if error is None else [f"calibration error on test images {percent(error)}"]
    return ", ".join(told)


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _known(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _value(value: Any) -> str:
    return printable(value)[:LONGEST]
