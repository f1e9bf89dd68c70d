"""The bank of all experts of a model, which runs batches with different experts per image."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from ..backbones import Backbone
from ..backbones.tracing import CALL_FIRST, tracing
from ..backbones.trunk import Trunk
from ..config.errors import ConfigError
from .calls import active_calls
from .expert import Expert, ExpertError, Seal
from .fused import FusedTable, make_table
from .guarded import Guarded
from .lock import ReadWriteLock
from .lora import LoraTable
from .sharing import shared, sharing
from .stage import Stage


FORMS = ("auto", "gathered", "stacked", "grouped")


class ExpertBank(Guarded):
    """All experts of a model on one backbone, run in mixed batches in which every image has its own experts.

    There are three exact forms, of which the bank chooses one:

    - *gathered*: indexes every image's own LoRA modules, prompts or prefixes from a table. Costs as much as a plain
      forward pass, for any number of experts.
    - *stacked*: multiplies by all LoRA modules and masks those not selected. For small pools; see [`LoraTable`].
    - *grouped*: one PEFT forward pass per expert present in the batch. For all other PEFT techniques.

    A new expert is trained in the *slot*, a plain PEFT model on a twin of the backbone, and then moved into the bank.
    It can be trained on top of others, whose updates are added to its own. Experts of a pool are trained in the bank's
    table: the forward pass is differentiable in `table.rows`.

    The bank is thread-safe, also while a thread adds, trains or removes an expert. Threads wait for each other only
    while an expert is moved, and in the grouped form, which runs one batch at a time. While a pool is trained, other
    threads get an error.

    Args:
        backbone ([`Backbone`]): The frozen model.
        form (`str`, *optional*, defaults to `"auto"`): `"gathered"`, `"stacked"` or `"grouped"` to force one.

    Raises:
        [`ExpertError`]: There is no such form.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts import ExpertBank
    >>> from hf_clpeft.experts.expert import make_peft_config

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> bank = ExpertBank(backbone)
    >>> _ = bank.start("task-000", make_peft_config({"peft_type": "LORA", "r": 1}, backbone))
    >>> _ = bank.finish("task-000")
    >>> features = bank(torch.zeros(2, 3, 32, 32), torch.tensor([0, 0]))
    >>> torch.equal(features, bank.frozen(torch.zeros(2, 3, 32, 32)))  # a fresh LoRA adapter changes nothing
    True

    ```
    """

    def __init__(self, backbone: Backbone, form: str = "auto"):
        super().__init__()
        if form not in FORMS:
            raise ExpertError(f"form={form!r} is not one of {', '.join(FORMS)}.")
        self._backbone = (backbone,)  # not a submodule: it is never saved
        self.form = form
        self.names: list[str] = []
        self.table: FusedTable | None = None  # the experts, if they have a fused form
        self.slot: Stage | None = None  # the expert in training
        self._configs: list[PeftConfig] = []
        self._sizes: dict[str, int] = {}  # parameters of each expert
        self._depth = 0  # first layers that no expert of the bank adapts
        self._at_rest: list[Expert] = []  # the experts, if not
        self._stage: Stage | None = None  # runs these, one after another
        self._stage_lock = ReadWriteLock()
        self._pool: list[tuple[torch.Tensor, torch.Tensor]] = []  # trained tensors of a pool, and their values before
        self._seal: Seal | None = None
        self._known: tuple[torch.Tensor, torch.Tensor] | None = None  # images, and their features in training

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self._backbone[0]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all experts."""
        return sum(self._sizes.values())

    @property
    def depth(self) -> int:
        """Number of first layers that no expert adapts, the one in training included; 0 without experts."""
        depths = ([self._depth] if self.names else []) + ([] if self.slot is None else [self.slot.depth])
        return min(depths, default=0)

    def sharing(self) -> AbstractContextManager[Trunk]:
        """Context manager: in this thread, passes over the same tensor of images run the layers below experts once."""
        return sharing(self, self.depth)

    def train(self, mode: bool = True) -> "ExpertBank":
        """Sets the mode of the expert in the slot; all others stay in evaluation mode."""
        super().train(False)
        if self.slot is not None:
            self.slot.train(mode)
        return self

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Expert:
        with self.reading():
            if self.table is None:
                return self._at_rest[index]
            tensors = self.table.unpack(self.table.read(range(len(self))[index]))
            tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
            return Expert(self.names[index], self._configs[index], tensors)

    def __iter__(self) -> Iterator[Expert]:
        return (self[index] for index in range(len(self)))

    # Adding and training experts

    def extend(self, experts: Iterable[Expert], count: int | None = None) -> None:
        """Adds trained experts, after checking that each fits the backbone.

        Args:
            experts (iterable of [`Expert`]): The experts.
            count (`int`, *optional*): Their number, to read them one by one. Default: all are read before.

        Raises:
            [`ExpertError`]: One does not fit, or differs from the others in more than its rank or prompt length.
        """
        if count is None:
            experts = list(experts)
            count = len(experts)
        with self.lock.writing():
            total = len(self) + count
            for number, expert in enumerate(experts):
                if self.table is None:
                    if self._stage is None or not self._stage.takes(expert.config):
                        expert.check_fits(self.backbone)  # allocates no memory for one that does not
                    self._put(expert)
                self._keep(expert, self._stage)
                if number == 0:
                    self.reserve(total)
            self._check_seal("An expert that was loaded")
            if self.table is not None:
                self._stage = None  # only needed to check the first expert

    def reserve(self, num_experts: int) -> None:
        """Allocates the table for this many experts of the size of the first."""
        with self.lock.writing():
            if self.table is not None:
                self.table.reserve(num_experts, num_experts * self.table.members.shape[1])

    def trim(self) -> None:
        """Shrinks the table to the experts it has, as if they were just loaded.

        The stacked form sums over all rows of the table, so that its rounding depends on their number.
        """
        with self.lock.writing():
            if self.table is not None:
                self.table.trim()

    def start(self, name: str, config: PeftConfig) -> PeftModel:
        """Loads an expert into the slot for training: the one of that name if there is one, else a new one.

        Returns:
            `peft.PeftModel`: Its trainable parameters are the expert's.

        Raises:
            [`ExpertError`]: Another thread is training.
        """
        self.claim(name)
        try:
            known = self[self.names.index(name)] if name in self.names else None
            slot = self.slot = self._make_stage(config if known is None else known.config)
            peft_model = slot.peft_model if known is None else slot.put(known)
            self._check_seal(f"The peft of {name!r}")
            return peft_model
        except BaseException:
            self.abandon()
            raise

    def finish(self, name: str) -> Expert:
        """Moves the trained expert from the slot into the bank, replacing one of the same name."""
        assert self.slot is not None
        self._check_seal(f"Training {name!r}")
        expert = Expert.from_peft_model(name, self.slot.peft_model)
        with self.lock.writing():
            if name not in self.names:
                self._keep(expert, self.slot)
            elif self.table is None:
                self._at_rest[self.names.index(name)] = expert
            else:
                self.table.write(self.names.index(name), *self._pack(expert))
            self._stage = None  # it may hold the previous state of this expert
            self.abandon()
        return expert

    def adopt(self, expert: Expert) -> None:
        """Copies a trained expert into the slot, instead of training it.

        Raises:
            [`ExpertError`]: Its configuration does not match the slot's.
        """
        assert self.slot is not None
        expert.copy_to(self.slot.peft_model)

    def under_training(
        self,
        pixel_values: torch.Tensor,
        on_top_of: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Differentiable [CLS] features with the expert in the slot.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            on_top_of (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`, *optional*): LoRA experts of the
                bank whose updates are added to that of the slot. They are not trained.
            factors (`torch.Tensor` of shape `(experts, layers)` or `(experts,)`, *optional*): What the updates of
                experts of the bank are multiplied by, differentiable; layers in the order of [`LoraTable`].

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.

        Raises:
            [`ExpertError`]: Updates can only be added if they are plain LoRA on linear layers.
        """
        assert self.slot is not None
        trunk = self.trunk
        if on_top_of is None:
            if self._known is not None and self._known[0] is pixel_values:
                return self._known[1]
            return self.slot(pixel_values, trunk=trunk)
        if not isinstance(self.table, LoraTable):
            raise ExpertError("Only experts that are plain LoRA on linear layers can be trained on top of others.")
        form, rows = self.table.form_for(on_top_of, "auto"), None if factors is None else self.table.scaled(factors)
        with self.reading():
            call = self.table.call_for(on_top_of, form, self.compute_dtype(), rows)
            return self.slot(pixel_values, trunk=trunk, call=call)  # its twin has the hooks of the backbone

    @contextmanager
    def knowing(self, pixel_values: torch.Tensor, features: torch.Tensor) -> Iterator[None]:
        """Context manager: features of images with the expert in the slot were computed in a pass of several experts.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): The images, recognised by their tensor.
            features (`torch.Tensor` of shape `(batch, hidden_size)`): From [`SlotsTogether`].
        """
        self._known = pixel_values, features
        try:
            yield
        finally:
            self._known = None

    def rescale(self, factors: torch.Tensor) -> None:
        """Multiplies the updates of all LoRA experts by factors; see [`~ExpertBank.under_training`]."""
        assert isinstance(self.table, LoraTable)
        with self.lock.writing(), torch.no_grad():
            self.table.rows.copy_(self.table.scaled(factors))

    def abandon(self) -> None:
        """Ends training and rolls back: empties the slot, and restores the pool."""
        self.slot = None
        for tensor, before in self._pool:
            tensor.detach().copy_(before)
        self.keep_pool()

    def make_pool(self, names: Sequence[str], config: PeftConfig) -> None:
        """Fills an empty bank with new experts.

        Raises:
            [`ConfigError`]: Their technique has no fused form, which a pool needs.
        """
        for name in names:
            self.start(name, config)
            self.finish(name)
            if self.table is None:
                self.remove(name)
                raise ConfigError(
                    "A pool runs fused, which needs prompts or LoRA on linear layers; the method has neither on "
                    f"{self.backbone.config.name_or_path}. Choose a vision transformer, or other target_modules."
                )
            self.reserve(len(names))

    def train_pool(self, keys: torch.Tensor) -> None:
        """Makes the table trainable by this thread, until [`~ExpertBank.keep_pool`] or [`~ExpertBank.abandon`].

        Args:
            keys (`torch.Tensor`): Keys of the router, which are trained as well.

        Raises:
            [`ExpertError`]: Another thread is training.
        """
        assert self.table is not None
        with self.lock.writing():
            self.claim("the pool")
            self.refuse_readers("a pool changes with every step")
            self._pool = [(tensor, tensor.detach().clone()) for tensor in (self.table.rows, keys)]
            for tensor, _ in self._pool:
                tensor.requires_grad_(True)

    def keep_pool(self) -> None:
        """Ends the training of a pool and keeps the result."""
        for tensor, _ in self._pool:
            tensor.requires_grad_(False)
            tensor.grad = None
        self._pool, self._trained, self._unreadable = [], None, ""

    def remove(self, name: str) -> None:
        """Removes an expert, also from the slot; the following ones move up."""
        with self.lock.writing():
            index = self.names.index(name)
            if self.table is None:
                del self._at_rest[index]
            else:
                self.table.remove(index)
            self._stage = None
            if self._trained is not None and self._trained[0] == name:
                self.abandon()
            del self.names[index], self._configs[index], self._sizes[name]
            if not self.names:
                self.table = None  # the next expert may be of another kind

    # Forward passes

    def frozen(self, pixel_values: torch.Tensor, layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """[CLS] features of the backbone without an expert.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            layers (`int` or sequence of `int`, *optional*): See [`Backbone.forward`].

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        with self.reading():
            return self.backbone(pixel_values, layers, self.trunk)

    def each(self, pixel_values: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        """Features with each of several experts applied alone.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            selection (integer `torch.Tensor` of shape `(batch, N)`): Experts of each image.

        Returns:
            `torch.Tensor` of shape `(batch, N, hidden_size)`.
        """
        count = selection.shape[1]
        rows = torch.arange(pixel_values.shape[0], device=pixel_values.device).repeat_interleave(count)
        with self.sharing():
            return self(self.take(pixel_values, rows), selection.flatten()).unflatten(0, (-1, count))

    def take(self, pixel_values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Some of the images, which within [`~ExpertBank.sharing`] share the layers below experts with the others.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            rows (integer `torch.Tensor` of shape `(count,)`): Which ones, in any order and number.

        Returns:
            `torch.Tensor` of shape `(count, 3, height, width)`.
        """
        images, trunk = pixel_values[rows], self.trunk
        if trunk is not None and trunk.depth:
            below = self.backbone.below(pixel_values, trunk)
            trunk.keep(images, below._replace(tokens=below.tokens[rows]))
        return images

    def forward(
        self,
        pixel_values: torch.Tensor,
        selection: torch.Tensor,
        readout: str = "cls",
        layers: int | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Features with each image's own experts applied.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Experts of each image. LoRA updates
                are summed, prompts and prefixes are concatenated.
            readout (`str`, *optional*, defaults to `"cls"`): `"cls"`, or `"prompts"` for the mean of the prompt
                tokens' outputs, as in L2P.
            layers (`int` or sequence of `int`, *optional*): See [`Backbone.forward`]; ignored for `"prompts"`.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        with self.reading():
            form = "grouped" if self.table is None else self.table.form_for(selection, self.form)
            if self.table is None or form == "grouped":
                with self._stage_lock.writing():
                    return self._run_grouped(pixel_values, selection, layers)
            trunk = self.trunk
            with self.table.selected(selection, form, self.compute_dtype()):
                if readout == "cls":
                    return self.backbone(pixel_values, layers, trunk)
                tokens = self.backbone.tokens(pixel_values)
            length = self.table.members.shape[1] * (selection.shape[1] if selection.dim() == 2 else 1)
            return tokens[:, 1 : 1 + length].mean(dim=1)

    def _run_grouped(
        self, pixel_values: torch.Tensor, selection: torch.Tensor, layers: int | Sequence[int] | None
    ) -> torch.Tensor:
        if selection.dim() == 2:
            raise ExpertError("Several experts for one image need LoRA, or prompts of one length.")
        groups, order, trunk = [], [], self.trunk
        if len(self) == 1:  # no selection is waited for
            return self._staged(0)(pixel_values, layers, trunk).to(pixel_values.dtype)
        if tracing():
            kind = self._configs[0].peft_type
            raise ExpertError(
                f"Experts of {getattr(kind, 'value', kind)} with these options run one after another, which one graph "
                "cannot do. Export the expert of one task, merged, or choose LoRA on linear layers, without DoRA, or "
                "prompts of one length."
            )
        for index in selection.unique().tolist():
            rows = (selection == index).nonzero()[:, 0]
            groups.append(self._staged(index)(self.take(pixel_values, rows), layers, trunk).to(pixel_values.dtype))
            order.append(rows)
        return torch.cat(groups)[torch.cat(order).argsort()]

    @property
    def trunk(self) -> Trunk | None:
        """What the passes of this thread share now: nothing while a method inserts something, or in one graph."""
        return None if active_calls() or torch.compiler.is_compiling() else shared(self)

    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the backbone computes now."""
        kind = self.backbone.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.backbone.model.dtype

    # Storage of experts

    def _keep(self, expert: Expert, stage: Stage | None) -> None:
        """Adds an expert to the bank. The first one, loaded on the stage, determines the kind of table."""
        if expert.name in self._sizes:
            raise ExpertError(f"The bank has an expert {expert.name!r} already; give this one another name.")
        if not self.names:
            assert stage is not None
            self.table = make_table(self.backbone, stage.peft_model)
        if self.table is None:
            self._at_rest.append(expert)
        else:
            self.table.append(*self._pack(expert))
        if stage is not None:  # experts of a table adapt the layers of the first
            self._depth = min(self._depth, stage.depth) if self.names else stage.depth
        self.names.append(expert.name)
        self._configs.append(expert.config)
        self._sizes[expert.name] = expert.num_parameters

    def _pack(self, expert: Expert) -> tuple[torch.Tensor, float]:
        assert self.table is not None
        config: Any = expert.config  # fields differ from class to class
        try:
            return self.table.pack(config, expert.tensors)
        except ValueError as error:
            raise ExpertError(f"Expert {expert.name!r} does not fit a bank with {self.names[:1]}: {error}") from error

    def _staged(self, index: int) -> Stage:
        """The stage with an expert on it."""
        stage = self._stage
        if stage is not None and stage.name == self.names[index]:
            return stage
        if tracing():
            raise ExpertError(CALL_FIRST)
        return self._put(self[index])

    def _put(self, expert: Expert) -> Stage:
        """Loads an expert on the stage."""
        stage = self._stage
        if stage is None:
            stage = self._stage = self._make_stage(expert.config)
        stage.put(expert)
        stage.requires_grad_(False)  # only the slot trains
        return stage

    def _make_stage(self, config: PeftConfig) -> Stage:
        if self._seal is None:
            self._seal = Seal(self.backbone.model)
        return Stage(self.backbone, config)

    def _check_seal(self, who: str) -> None:
        """Raises [`ExpertError`] if the weights of the backbone, which stages share, have changed."""
        if self._seal is not None:
            self._seal.check(who)
