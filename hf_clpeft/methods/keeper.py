"""What a method has learnt, and what can be done with it: show, save, combine, unlearn, reject."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..backbones import Backbone
from ..backbones.precision import KeepsPrecision
from ..config import ConfigError, ContinualConfig, MethodOptions, TaskConfig
from ..experts import ExpertBank
from ..routing import Router, router_title
from .heads import Heads
from .state import ELSEWHERE, Snapshot, load_state


class Keeper(KeepsPrecision):
    """What every [`Method`] keeps, and what it can do with that: the half of it that a new method seldom touches.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config ([`ContinualConfig`]): The options, and the tasks learnt so far.
    """

    @dataclass
    class Config(MethodOptions):
        pass

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str | None] = None
    trains: ClassVar[bool] = True
    independent: ClassVar[bool] = False
    reads: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    fixed_query: ClassVar[bool] = True
    trains_by_query: ClassVar[bool] = False
    takes_one_class: ClassVar[bool] = False
    experts: ClassVar[str] = ""
    which_router: ClassVar[str] = ""
    which_head: ClassVar[str] = "none"

    options: Any  # the method's own Config
    router: Router | None
    heads: Heads | None

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__()
        self._backbone = (backbone,)  # not a submodule: it is never saved
        self.config, self.options = config, config.method
        self.bank = ExpertBank(backbone)
        self.router = self.heads = None
        self.query_layers = self._find_layers(getattr(self.options, "query_layers", None))
        self.task: TaskConfig | None = None
        self.seed = 0
        self.before: Snapshot | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self._backbone[0]

    @property
    def tasks(self) -> list[TaskConfig]:
        """All tasks, the one that is being learnt included."""
        return [*self.config.tasks, *([self.task] if self.task else [])]

    @property
    def classes(self) -> list[str]:
        """All classes by their number, those of the task that is being learnt included."""
        return list(dict.fromkeys([*self.config.classes, *(self.task.classes if self.task else [])]))

    @property
    def numbers(self) -> list[int]:
        """Numbers of the classes of the task that is being learnt."""
        assert self.task is not None
        number_of = {label: number for number, label in enumerate(self.classes)}
        return [number_of[label] for label in self.task.classes]

    def expert_names(self) -> list[str]:
        """Names of the experts of a model that has learnt the tasks of `config`, in the order of the bank."""
        return self.config.expert_names

    def check(self) -> None:
        """Raises [`ConfigError`] unless all that the tasks need has been learnt, before it is saved."""
        if self.router is not None:
            self.router.check_knows([task.name for task in self.config.tasks], self.config.classes)

    def expert_of(self, position: int) -> int | None:
        """Position of the expert that a task has trained for itself; `None` where none belongs to a task."""
        return None

    @property
    def num_selected(self) -> int:
        """How many experts an image selects."""
        return 1

    def choose(self, expert: str) -> int:
        """Position of an expert that all images are to go to.

        Args:
            expert (`str`): Its name.

        Raises:
            [`ConfigError`]: There is no such expert, or none can be chosen.
        """
        if not self.reads or not len(self.bank):
            raise ConfigError(f"expert={expert!r}: no expert judges images in {self.name}.")
        if expert not in self.bank.names:
            raise ConfigError(f"expert={expert!r} is not one of {', '.join(self.bank.names)}.")
        return self.bank.names.index(expert)

    def why_no_reject(self) -> str | None:
        """Why out-of-distribution images cannot be told; `None` if [`~Method.typicality`] tells them."""
        return (
            f"reject_rate needs prototypes, and {self.name} has none: choose an S-X method with router='prototypes'."
        )

    def typicality(self, distances: torch.Tensor) -> torch.Tensor:
        """Conformal p-values: the share of a task's own images that are as far off as these, or farther.

        Args:
            distances (`torch.Tensor` of shape `(batch, experts)`): Of [`Routing`].

        Returns:
            `torch.Tensor` of shape `(batch,)`, the largest over all tasks, in [0, 1].
        """
        raise NotImplementedError(self.why_no_reject())

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        """Unlearns a task exactly: nothing else changes by a bit.

        Args:
            position (`int`): Of the task.
            number_of (`dict[int, int]`): New number of each class that stays.

        Raises:
            [`ConfigError`]: It cannot.
        """
        raise ConfigError(f"All tasks trained the same parameters in {self.name}; none can be removed exactly.")

    def alike(self) -> dict[str, Any]:
        """What must agree in models that are combined, by what to call it.

        Raises:
            [`ConfigError`]: Its tasks cannot be combined with those of others. The message goes on after its name.
        """
        raise ConfigError(f"is of the method {self.name}, whose experts belong to no task")

    def merged_options(self, others: "list[Keeper]") -> MethodOptions:
        """Options of a model with the tasks of this method and of others that are alike."""
        return self.options

    def merge(self, other: "Keeper", number_of: list[int], names: list[str]) -> None:
        """Adds all tasks of another model's method, as if they had been learnt here.

        Args:
            other ([`Method`]): What to add.
            number_of (`list[int]`): Number that each of its classes has here.
            names (`list[str]`): Names that its tasks have here.
        """
        raise NotImplementedError

    def state(self) -> dict[str, torch.Tensor]:
        """What is kept besides experts, router and head, by name."""
        kept = self.state_dict(keep_vars=True).items()
        return {name: tensor for name, tensor in kept if not name.startswith(ELSEWHERE)}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of [`~Method.state`]; raises `ValueError` if something does not fit."""
        load_state(self, tensors, self.state())

    @classmethod
    def facts(cls, options: Any) -> dict[str, str]:
        """What the card tells of the method, in words: its experts, PEFT technique, router and head."""
        if not cls.experts:  # of somebody who says no more
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
        """Whether models with these options can tell out-of-distribution images."""
        return False

    def fingerprint(self) -> dict[str, Any]:
        """What must not differ between a run and the one that goes on with it: the options, as they were given."""
        return {option: value for option, value in self.options.to_dict().items() if option != "head"}

    def num_bytes(self) -> int:
        """Bytes of all that the tasks have left; none before the first."""
        if not self.config.tasks:
            return 0
        kept = [*self.state().values()]
        for part in (self.router, self.heads):
            kept += [] if part is None else part.state_dict().values()
        return 4 * self.bank.num_parameters + sum(tensor.nbytes for tensor in kept)

    def _find_layers(self, wanted: list[int] | None) -> list[int]:
        """Query layers as an option has them, where -1 is the last, counted from 1."""
        count = self.backbone.num_layers
        layers = [number + count + 1 if number < 0 else number for number in wanted or [count]]
        if layers != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= count:
            raise ConfigError(f"query_layers={wanted}, but the backbone has {count} layers.")
        return layers
