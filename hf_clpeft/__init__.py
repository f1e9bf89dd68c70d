"""hf_clpeft: continual learning with PEFT adapters on a frozen vision transformer.

The public names all stand here; `help(hf_clpeft.ContinualModel)` explains one, with an example. They are imported when
they are first used, so that `import hf_clpeft` costs nothing.
"""

from importlib import import_module
from typing import Any


__version__ = "0.1.0"

_MODULES = {
    "errors": ["ConfigError", "HfClpeftError"],
    "config": ["ContinualConfig", "MethodConfig"],
    "streams": ["BENCHMARKS", "Benchmark", "StreamError", "Task", "TaskStream", "load_benchmark", "load_task"],
    "backbones": ["Backbone", "BackboneError", "load_backbone"],
    "experts": ["Expert", "ExpertBank", "ExpertError", "PromptTunedVisionModel"],
    "routing": [
        "ROUTERS",
        "ClassMeanRouter",
        "ClassRouter",
        "GaussianRouter",
        "KeyRouter",
        "PrototypeRouter",
        "RidgeRouter",
    ],
    "heads": ["Heads"],
    "report": ["StreamReport"],
    "hub.errors": ["HubError"],
    "prediction": ["Prediction"],
    "modeling": ["ContinualModel"],
    "hub.combine": ["combine"],
    "methods": [
        "METHODS",
        "joint_lora",
        "l2l",
        "l2p",
        "linear_probe",
        "ncm",
        "ranpac",
        "ranpac_first",
        "s_lora",
        "s_lora_mix",
        "s_lora_pp",
        "s_prompts",
        "s_prompts_pp",
        "sequential_lora",
        "slda",
    ],
    "training": ["ContinualTrainer", "ContinualTrainingArguments", "TrainingError"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
