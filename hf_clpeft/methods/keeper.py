"""The state of a method, and operations on it: save, combine, unlearn, reject."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..backbones import Backbone
from ..backbones.precision import KeepsPrecision
from ..config import ConfigError, ContinualConfig, MethodOptions, TaskConfig
from ..config.method import RESOLVED
from ..experts import ExpertBank, make_peft_config
from ..routing import Router, router_title
from .heads import Heads
from .papers import PAPERS
from .state import ELSEWHERE, Snapshot, load_state


class Keeper(KeepsPrecision):
    """Base of [`Method`] with the state of a method and operations on it, which new methods rarely override."""

    @dataclass
    class Config(MethodOptions):
        pass

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str | None] = None
    trains: ClassVar[bool] = True
    independent: ClassVar[bool] = False
    remade: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    fixed_query: ClassVar[bool] = True
    query_passes: ClassVar[int] = 1
    trains_by_query: ClassVar[bool] = False
    reads_by_query: ClassVar[bool] = False
    takes_one_class: ClassVar[bool] = False
    experts: ClassVar[str] = ""
    which_router: ClassVar[str] = ""
    which_head: ClassVar[str] = "none"

    chained: bool = False  # may depend on the options
    options: Any  # the method's own Config
    router: Router | None
    heads: Heads | None

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__()
        self._backbone = (backbone,)  # not a submodule: it is never saved
        self.config, self.options = config, config.method
        self.bank = ExpertBank(backbone)
        self.router = self.heads = None
        self.query_layers = self._find_layers("query_layers") or [backbone.num_layers]
        self.expert_layers = self._find_layers("expert_layers")
        if self.expert_layers is not None:
            make_peft_config(self.options.peft, backbone, self.expert_layers)  # raises before anything is trained
        self.task: TaskConfig | None = None
        self.seed = 0
        self.before: Snapshot | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self._backbone[0]

    @property
    def tasks(self) -> list[TaskConfig]:
        """All tasks, including the one being learnt."""
        return [*self.config.tasks, *([self.task] if self.task else [])]

    @property
    def classes(self) -> list[str]:
        """All class names by index, including those of the task being learnt."""
        return list(dict.fromkeys([*self.config.classes, *(self.task.classes if self.task else [])]))

    @property
    def numbers(self) -> list[int]:
        """Indices of the classes of the task being learnt."""
        assert self.task is not None
        number_of = {label: number for number, label in enumerate(self.classes)}
        return [number_of[label] for label in self.task.classes]

    def expert_names(self) -> list[str]:
        """Names of the experts after the tasks in `config`, in the order of the bank."""
        return self.config.expert_names

    def check(self) -> None:
        """Raises [`ConfigError`] if the state of a task is incomplete; called before saving and after loading."""
        if self.router is not None:
            self.router.check_knows([task.name for task in self.config.tasks], self.config.classes)

    def expert_of(self, position: int) -> int | None:
        """Index of the expert of a task; `None` if experts do not belong to tasks."""
        return None

    @property
    def num_selected(self) -> int:
        """Number of experts selected per image."""
        return 1

    def choose(self, expert: str) -> int:
        """Index of an expert that the user has chosen by name, in place of routing.

        Raises:
            [`ConfigError`]: There is no such expert, or the method does not support a choice.
        """
        if not self.reads or not len(self.bank):
            raise ConfigError(f"expert={expert!r}: no expert judges images in {self.name}.")
        if expert not in self.bank.names:
            raise ConfigError(f"expert={expert!r} is not one of {', '.join(self.bank.names)}.")
        return self.bank.names.index(expert)

    def why_no_reject(self) -> str | None:
        """Why out-of-distribution images cannot be rejected; `None` if they can."""
        return (
            f"reject_rate needs a router that keeps tasks apart, and {self.name} has none: choose slda_pp, or "
            "router='prototypes' or router='gaussian' in an S-X method, or s_lora_mix."
        )

    def typicality(self, query: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of images; arguments and result as for [`Router.typicality`]."""
        raise NotImplementedError(self.why_no_reject())

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        """Unlearns a task exactly: everything else stays bit-identical.

        Args:
            position (`int`): Index of the task.
            number_of (`dict[int, int]`): Maps old to new indices of the remaining classes.

        Raises:
            [`ConfigError`]: The task cannot be removed exactly.
        """
        if self.independent:
            raise ConfigError(f"{self.name} does not implement `remove`, so no task can be unlearnt.")
        raise ConfigError(f"All tasks trained the same parameters in {self.name}; none can be removed exactly.")

    def alike(self) -> dict[str, Any]:
        """Properties that must be equal in models to combine: values by name.

        Raises:
            [`ConfigError`]: The method cannot be combined. The message continues a sentence that starts with the
                model's name.
        """
        why = "which does not implement `alike` and `merge`" if self.independent else "whose experts belong to no task"
        raise ConfigError(f"is of the method {self.name}, {why}")

    def merged_options(self, others: "list[Keeper]") -> MethodOptions:
        """Options of the combination with other methods whose [`~Method.alike`] is equal."""
        return self.options

    def merge(self, other: "Keeper", number_of: list[int], names: list[str]) -> None:
        """Appends all tasks of another model's method.

        Args:
            other ([`Method`]): Method to merge.
            number_of (`list[int]`): Maps its class indices to those of this model.
            names (`list[str]`): New names of its tasks.
        """
        raise NotImplementedError(f"{type(self).__name__} implements `alike`, so it must implement `merge`.")

    def state(self) -> dict[str, torch.Tensor]:
        """State dict without experts, router and head: the content of `method.safetensors`."""
        # Not by `state_dict` of the whole, which fails if another thread begins or ends a task meanwhile.
        kept = {**dict(self._parameters), **dict(self._buffers)}
        for name in self._non_persistent_buffers_set:
            kept.pop(name, None)
        for name, part in dict(self._modules).items():
            if part is not None and not f"{name}.".startswith(ELSEWHERE):
                kept |= part.state_dict(prefix=f"{name}.", keep_vars=True)
        return {name: tensor for name, tensor in kept.items() if tensor is not None and not name.startswith(ELSEWHERE)}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of [`~Method.state`]; raises `ValueError` on missing or unexpected tensors."""
        load_state(self, tensors, self.state())

    @classmethod
    def facts(cls, options: Any) -> dict[str, str]:
        """Descriptions for the card: experts, PEFT technique, router, head; or the options, if `experts` is empty."""
        if not cls.experts:
            given = ", ".join(f"{name} = {value}" for name, value in vars(options).items())
            return {"options": given} if given else {}
        peft, router = getattr(options, "peft", {}), getattr(options, "router", cls.which_router)
        return {
            "experts": cls.experts.format(**vars(options)),
            "PEFT": ", ".join(f"{key} = {value}" for key, value in peft.items()) or "none",
            "router": router_title(router) if router else "none",
            "head": getattr(options, "head", cls.which_head).replace("_", " "),
        }

    @classmethod
    def rejects(cls, options: Any) -> bool:
        """Whether models with these options support `reject_rate`."""
        return False

    @classmethod
    def calibrates(cls, options: Any) -> bool:
        """Whether scores of models with these options are probabilities, calibrated across tasks."""
        return False

    def temperature(self) -> float | None:
        """The temperature of calibrated scores, if it was measured."""
        return None

    @classmethod
    def citation(cls) -> str | None:
        """The paper to cite, in BibTeX; by default, that of `paper`, if it is one of `PAPERS`."""
        return PAPERS[cls.paper].bibtex() if cls.paper in PAPERS else None

    def fingerprint(self) -> dict[str, Any]:
        """Options that must be equal when a run is resumed."""
        return {option: value for option, value in self.options.to_dict().items() if option not in RESOLVED}

    def num_bytes(self) -> int:
        """Size of the learnt state in bytes; 0 before the first task."""
        if not self.config.tasks:
            return 0
        kept = [*self.state().values()]
        for part in (self.router, self.heads):
            state = {} if part is None else part.state_dict()
            kept += [tensor for name, tensor in state.items() if name != "few" or tensor.any()]  # as it is saved
        return 4 * self.bank.num_parameters + sum(tensor.nbytes for tensor in kept)

    def _find_layers(self, option: str) -> list[int] | None:
        """Resolves an option of layers, in which -1 is the last one, to indices from 1; `None` if it is unset."""
        count, wanted = self.backbone.num_layers, getattr(self.options, option, None)
        if wanted is None:
            return None
        layers = [number + count + 1 if number < 0 else number for number in wanted]
        if not 1 <= min(layers) <= max(layers) <= count:
            raise ConfigError(f"{option}={wanted}, but the backbone has {count} layers.")
        if layers != sorted(set(layers)):
            raise ConfigError(f"{option}={wanted} must rise, but of {count} layers these are {layers}.")
        return layers
