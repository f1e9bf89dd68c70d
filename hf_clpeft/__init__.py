"""hf_clpeft: continual learning with PEFT adapters on a frozen vision transformer.

The public names all stand here; `help(hf_clpeft.ContinualModel)` explains one, with an example. They are imported when
they are first used, so that `import hf_clpeft` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # what is imported below when it is first used; a test holds the two lists together
    from .backbones import (
        Backbone as Backbone,
        BackboneError as BackboneError,
        load_backbone as load_backbone,
    )
    from .combining import (
        combine as combine,
    )
    from .config import (
        ConfigError as ConfigError,
        ContinualConfig as ContinualConfig,
        HfClpeftError as HfClpeftError,
        MethodOptions as MethodOptions,
    )
    from .config.hub_errors import (
        HubError as HubError,
    )
    from .experts import (
        Expert as Expert,
        ExpertBank as ExpertBank,
        ExpertError as ExpertError,
        PrefixTunedVisionModel as PrefixTunedVisionModel,
        PromptTunedVisionModel as PromptTunedVisionModel,
        make_peft_config as make_peft_config,
    )
    from .methods import (
        METHODS as METHODS,
        Batch as Batch,
        Heads as Heads,
        Method as Method,
        aper as aper,
        coda_prompt as coda_prompt,
        dualprompt as dualprompt,
        ease as ease,
        inflora as inflora,
        klda as klda,
        l2l as l2l,
        l2p as l2p,
        layup as layup,
        layup_first as layup_first,
        linear_probe as linear_probe,
        loranpac as loranpac,
        loranpac_first as loranpac_first,
        mos as mos,
        ncm as ncm,
        ranpac as ranpac,
        ranpac_first as ranpac_first,
        s_lora as s_lora,
        s_lora_mix as s_lora_mix,
        s_lora_pp as s_lora_pp,
        s_prompts as s_prompts,
        s_prompts_pp as s_prompts_pp,
        s_x as s_x,
        s_x_pp as s_x_pp,
        sd_lora as sd_lora,
        sequential_lora as sequential_lora,
        slca as slca,
        slda as slda,
        slda_pp as slda_pp,
        ssiat as ssiat,
        tuna as tuna,
    )
    from .model import (
        ContinualModel as ContinualModel,
    )
    from .prediction import (
        Prediction as Prediction,
    )
    from .reports.report import (
        StreamReport as StreamReport,
    )
    from .routing import (
        ROUTERS as ROUTERS,
        ClassMeanRouter as ClassMeanRouter,
        ClassRouter as ClassRouter,
        GaussianRouter as GaussianRouter,
        KeyRouter as KeyRouter,
        KldaRouter as KldaRouter,
        LinearRidgeRouter as LinearRidgeRouter,
        LowRankRidgeRouter as LowRankRidgeRouter,
        PrototypeRouter as PrototypeRouter,
        RidgeRouter as RidgeRouter,
        Router as Router,
        Routing as Routing,
    )
    from .streams import (
        BENCHMARKS as BENCHMARKS,
        Benchmark as Benchmark,
        StreamError as StreamError,
        Task as Task,
        TaskStream as TaskStream,
        load_benchmark as load_benchmark,
        load_task as load_task,
    )
    from .training import (
        ContinualTrainer as ContinualTrainer,
        ContinualTrainingArguments as ContinualTrainingArguments,
        TrainerCallback as TrainerCallback,
        TrainingError as TrainingError,
    )
    from .training.recipe import (
        run_recipe as run_recipe,
    )


__version__ = "0.1.0"

_MODULES = {
    "config": ["ConfigError", "ContinualConfig", "HfClpeftError", "MethodOptions"],
    "streams": ["BENCHMARKS", "Benchmark", "StreamError", "Task", "TaskStream", "load_benchmark", "load_task"],
    "backbones": ["Backbone", "BackboneError", "load_backbone"],
    "experts": [
        "Expert",
        "ExpertBank",
        "ExpertError",
        "PrefixTunedVisionModel",
        "PromptTunedVisionModel",
        "make_peft_config",
    ],
    "routing": [
        "ClassMeanRouter",
        "ClassRouter",
        "GaussianRouter",
        "KeyRouter",
        "KldaRouter",
        "LinearRidgeRouter",
        "LowRankRidgeRouter",
        "PrototypeRouter",
        "ROUTERS",
        "RidgeRouter",
        "Router",
        "Routing",
    ],
    "methods": [
        "Batch",
        "Heads",
        "METHODS",
        "Method",
        "aper",
        "coda_prompt",
        "dualprompt",
        "ease",
        "inflora",
        "klda",
        "l2l",
        "l2p",
        "layup",
        "layup_first",
        "linear_probe",
        "loranpac",
        "loranpac_first",
        "mos",
        "ncm",
        "ranpac",
        "ranpac_first",
        "s_lora",
        "s_lora_mix",
        "s_lora_pp",
        "s_prompts",
        "s_prompts_pp",
        "s_x",
        "s_x_pp",
        "sd_lora",
        "sequential_lora",
        "slca",
        "slda",
        "slda_pp",
        "ssiat",
        "tuna",
    ],
    "reports.report": ["StreamReport"],
    "config.hub_errors": ["HubError"],
    "prediction": ["Prediction"],
    "model": ["ContinualModel"],
    "combining": ["combine"],
    "training": ["ContinualTrainer", "ContinualTrainingArguments", "TrainerCallback", "TrainingError"],
    "training.recipe": ["run_recipe"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
