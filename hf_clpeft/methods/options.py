"""Options shared by several methods."""

from dataclasses import dataclass, field
from typing import Any

from ..config import ConfigError, MethodOptions
from ..config.adapters import LARGEST_RANK, check_peft
from .layers import check_layers


LARGEST_PROJECTION = 100_000  # random features; the router stores a square matrix of this size


@dataclass(kw_only=True)
class ExpertLayerOptions(MethodOptions):
    """Layers of the experts."""

    expert_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers that experts adapt, from 1, or from -1 down; default: all. All passes over an image share "
            "the layers below, as query features do."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers("expert_layers", self.expert_layers)


@dataclass
class PeftOptions(ExpertLayerOptions):
    """Experts of any PEFT technique."""

    peft: dict[str, Any] = field(
        default_factory=dict, metadata={"help": 'PEFT technique and its arguments, for example {"peft_type": "IA3"}.'}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_peft(self.peft)


@dataclass
class LoraOptions(ExpertLayerOptions):
    """LoRA experts. `lora_alpha` defaults to `r`, so that updates are not scaled."""

    r: int = field(default=1, metadata={"help": "Rank of the LoRA adapters."})
    lora: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": 'Further arguments of peft.LoraConfig, for example {"lora_dropout": 0.1}.'},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("r", self.r)
        check_peft(self.peft)

    @property
    def peft(self) -> dict[str, Any]:
        """The PEFT technique and its arguments."""
        return {"peft_type": "LORA", "r": self.r, "lora_alpha": self.r, **self.lora}


@dataclass
class PromptOptions(MethodOptions):
    """Prompts as experts."""

    prompt_length: int = field(default=10, metadata={"help": "Tokens per prompt, inserted after [CLS]."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("prompt_length", self.prompt_length)

    @property
    def peft(self) -> dict[str, Any]:
        """The PEFT technique and its arguments."""
        return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": self.prompt_length}


@dataclass
class QueryOptions(MethodOptions):
    """Layers of the query features."""

    query_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers whose [CLS] features are concatenated as query features; default: the last, -1."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers("query_layers", self.query_layers)


@dataclass
class CovarianceOptions(MethodOptions):
    """Covariance of Gaussian routers."""

    covariance_rank: int | None = field(
        default=None,
        metadata={"help": "Principal components of a task's covariance that Gaussian routers keep; default: all."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.covariance_rank is not None:
            _check_size("covariance_rank", self.covariance_rank)


@dataclass
class ProjectionOptions(MethodOptions):
    """Random projection of RanPAC."""

    projection_size: int = field(default=10_000, metadata={"help": "Random features of the ridge router."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.projection_size <= LARGEST_PROJECTION:
            raise ConfigError(
                f"projection_size={self.projection_size} must be between 1 and {LARGEST_PROJECTION:,} features."
            )


def _check_size(name: str, value: int) -> None:
    if not 1 <= value <= LARGEST_RANK:
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {LARGEST_RANK:,}.")
