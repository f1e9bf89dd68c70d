"""All experts of a model, and how a batch runs through them when every image has its own."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from ..backbones import Backbone
from .expert import ADAPTER, Expert, ExpertError, Seal, make_peft_model
from .lora import LoraTable
from .prompts import PromptTable


FORMS = ("auto", "gathered", "stacked", "grouped")


class ExpertBank(torch.nn.Module):
    """All experts of a model on one backbone, run in one batch in which every image has its own selection.

    There are three exact ways, and the bank takes the one that suits:

    - *gathered*: every image's own LoRA modules or prompts, fetched from a table in one go. Costs what a plain forward
      costs, however many experts there are.
    - *stacked*: all LoRA modules at once, those that are not selected masked. For small pools; see [`LoraTable`].
    - *grouped*: one PEFT forward per expert present in the batch. For every other PEFT technique.

    A new expert is trained in the *slot*, which is a plain PEFT model, and then moves into the bank. Experts of a pool
    are trained in the bank's table: the forward is differentiable in `table.rows`.

    Args:
        backbone ([`Backbone`]): The frozen model.
        form (`str`, *optional*, defaults to `"auto"`): `"stacked"`, `"gathered"` or `"grouped"` to insist on one.

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
        self.backbone = backbone
        self.form = form
        self.names: list[str] = []
        self.table: LoraTable | PromptTable | None = None  # where experts are, if they have a fused form
        self.slot: PeftModel | None = None
        self._configs: list[PeftConfig] = []
        self._at_rest: list[Expert] = []  # where experts are, if not
        self._in_slot: Expert | None = None
        self._seal: Seal | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Expert:
        if self.table is None:
            return self._at_rest[index]
        tensors = self.table.unpack(self.table.read(range(len(self))[index]))
        tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        return Expert(self.names[index], self._configs[index], tensors)

    def __iter__(self) -> Iterator[Expert]:
        return (self[index] for index in range(len(self)))

    # Adding and training experts

    def extend(self, experts: Iterable[Expert]) -> None:
        """Adds trained experts, after trying that each fits the backbone.

        Raises:
            [`ExpertError`]: One does not fit, or differs from the others in more than its rank or length.
        """
        experts = list(experts)
        for count, expert in enumerate(experts):
            if self.table is None:
                self._try(expert)
            self._keep(expert)
            if count == 0:
                self.reserve(len(self) - 1 + len(experts))
        if self._seal is not None:
            self._seal.check("An expert that was loaded")
        self._clear_slot()

    def reserve(self, num_experts: int) -> None:
        """Makes room for so many experts of the size of the first, so that the table need not grow on the way."""
        if self.table is not None:
            self.table.reserve(num_experts, num_experts * self.table.members.shape[1])

    def start(self, name: str, config: PeftConfig) -> PeftModel:
        """Puts an expert into the slot for training: the one of that name if there is one, else a fresh one.

        Returns:
            `peft.PeftModel`: Its trainable parameters are the expert's.
        """
        slot = self._put(self[self.names.index(name)]) if name in self.names else self._make_slot(config)
        if self._seal is not None:
            self._seal.check(f"The peft of {name!r}")
        self._in_slot = None  # from here on the slot holds nothing that is at rest
        return slot

    def finish(self, name: str) -> Expert:
        """Moves the trained expert from the slot into the bank, replacing one of the same name."""
        assert self.slot is not None and self._seal is not None
        self._seal.check(f"Training {name!r}")
        expert = self._in_slot = Expert.from_peft_model(name, self.slot)
        if name not in self.names:
            self._keep(expert)
        elif self.table is None:
            self._at_rest[self.names.index(name)] = expert
        else:
            self.table.write(self.names.index(name), *self._pack(expert))
        self._clear_slot()
        return expert

    def abandon(self) -> None:
        """Takes what is being trained out of the slot, and forgets it."""
        self._empty_slot()

    def remove(self, name: str) -> None:
        """Takes an expert out, of the slot too; those behind it move up."""
        index = self.names.index(name)
        if self.table is None:
            del self._at_rest[index]
            self._empty_slot()
        else:
            self.table.remove(index)
        del self.names[index], self._configs[index]

    # Forward passes

    def frozen(self, pixel_values: torch.Tensor, num_layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """[CLS] features of the backbone without any expert.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            num_layers (`int` or sequence of `int`, *optional*): See [`Backbone.forward`].

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        with self._slot_disabled():
            return self.backbone(pixel_values, num_layers)

    def forward(
        self,
        pixel_values: torch.Tensor,
        selection: torch.Tensor,
        readout: str = "cls",
        num_layers: int | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Features with every image under its own experts.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Experts of each image. Several LoRA
                experts are summed, several prompts stand one after another.
            readout (`str`, *optional*, defaults to `"cls"`): `"cls"`, or `"prompts"` for the mean of the prompt
                tokens' outputs, as in L2P.
            num_layers (`int` or sequence of `int`, *optional*): See [`Backbone.forward`]; of no use to `"prompts"`.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        form = "grouped" if self.table is None else self.table.form_for(selection, self.form)
        if self.table is None or form == "grouped":
            return self._run_grouped(pixel_values, selection, num_layers)
        with self._slot_disabled(), self.table.selected(selection, form, self._compute_dtype()):
            if readout == "cls":
                return self.backbone(pixel_values, num_layers)
            tokens = self.backbone.tokens(pixel_values)
        length = self.table.members.shape[1] * (selection.shape[1] if selection.dim() == 2 else 1)
        return tokens[:, 1 : 1 + length].mean(dim=1)

    def _run_grouped(
        self, pixel_values: torch.Tensor, selection: torch.Tensor, num_layers: int | Sequence[int] | None
    ) -> torch.Tensor:
        if selection.dim() == 2:
            raise ExpertError("Several experts for one image need LoRA, or prompts of one length.")
        if self.slot is not None and self._in_slot is None:
            raise ExpertError("An expert is being trained in the slot that others would run in; finish it first.")
        groups, order = [], []
        for index in selection.unique().tolist():
            if self._in_slot is None or self._in_slot.name != self.names[index]:
                self._put(self[index])
            rows = (selection == index).nonzero()[:, 0]
            groups.append(self.backbone(pixel_values[rows], num_layers).to(pixel_values.dtype))
            order.append(rows)
        return torch.cat(groups)[torch.cat(order).argsort()]

    def _compute_dtype(self) -> torch.dtype:
        kind = self.backbone.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.backbone.model.dtype

    # The slot

    def _keep(self, expert: Expert) -> None:
        """Takes an expert into the bank. The first one, which is in the slot, decides what the bank is made of."""
        if expert.name in self.names:
            raise ExpertError(f"The bank has an expert {expert.name!r} already; give this one another name.")
        if not self.names:
            self.table = self._make_table()
        if self.table is None:
            self._at_rest.append(expert)
        else:
            self.table.append(*self._pack(expert))
        self.names.append(expert.name)
        self._configs.append(expert.config)

    def _make_table(self) -> LoraTable | PromptTable | None:
        assert self.slot is not None
        if self.slot.peft_config[ADAPTER].is_prompt_learning:
            return PromptTable(self.backbone)
        return LoraTable.made_for(self.backbone, self.slot)

    def _pack(self, expert: Expert) -> tuple[torch.Tensor, float]:
        assert self.table is not None
        config: Any = expert.config  # fields differ from class to class; the table knows those that it needs
        try:
            return self.table.pack(config, expert.tensors)
        except ValueError as error:
            raise ExpertError(f"Expert {expert.name!r} does not fit a bank with {self.names[:1]}: {error}") from error

    def _slot_disabled(self) -> AbstractContextManager[None]:
        return nullcontext() if self.slot is None else self.slot.disable_adapter()

    def _try(self, expert: Expert) -> None:
        """Puts an expert from elsewhere into the slot, and takes no memory for one that does not fit."""
        if self.slot is None or not _alike(self.slot.peft_config[ADAPTER], expert.config):
            self._empty_slot()
            expert.check_fits(self.backbone)
        self._put(expert)

    def _put(self, expert: Expert) -> PeftModel:
        slot = self.slot
        if slot is None or not _alike(slot.peft_config[ADAPTER], expert.config):
            slot = self._make_slot(expert.config)
        expert.copy_to(slot)
        self._in_slot = expert
        return slot

    def _make_slot(self, config: PeftConfig) -> PeftModel:
        self._empty_slot()
        if self._seal is None:
            self._seal = Seal(self.backbone.model)
        slot = self.slot = make_peft_model(self.backbone, config).to(self.backbone.device)
        return slot

    def _clear_slot(self) -> None:
        """A backbone without PEFT's wrappers is faster; only grouped experts run in the slot."""
        if self.table is not None:
            self._empty_slot()

    def _empty_slot(self) -> None:
        if self.slot is not None:
            self.slot.unload()
        self.slot = self._in_slot = None


# Fields that say where an adapter comes from rather than what it looks like.
_PROVENANCE = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type", "auto_mapping"}


def _alike(config: PeftConfig, other: PeftConfig) -> bool:
    """Whether adapters of both configurations fit into the same slot."""
    return all(
        value == other.to_dict().get(name) for name, value in config.to_dict().items() if name not in _PROVENANCE
    )
