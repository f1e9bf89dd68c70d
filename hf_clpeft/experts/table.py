"""Experts as rows of one tensor, so that a single indexing operation selects those of a whole batch."""

from typing import Any

import torch

from ..backbones.precision import KeepsPrecision


class ExpertTable(KeepsPrecision):
    """Experts as components: rank-one updates of LoRA, or tokens of prompts.

    An expert, or a selection of experts, is the sum (LoRA) or the concatenation (prompts) of its components, so a
    batch is described by the row indices of every image's components. Row 0 is all zeros and pads experts with fewer
    components than others. The capacity doubles when the table is full, so adding an expert takes amortised constant
    time, and a compiled forward pass stays valid until then.

    Args:
        width (`int`): Number of values per component.
        device (`torch.device`): Device of the table.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.experts.table import ExpertTable

    >>> table = ExpertTable(width=2, device=torch.device("cpu"))
    >>> table.append(torch.ones(1, 2))
    >>> table.append(torch.full((3, 2), 7.0))
    >>> table.components(torch.tensor([1, 0])).tolist()  # the first expert is padded with row 0
    [[2, 3, 4], [1, 0, 0]]

    ```
    """

    scales: torch.Tensor
    members: torch.Tensor

    def __init__(self, width: int, device: torch.device):
        super().__init__()
        kind: Any = {"dtype": torch.float32, "device": device}
        self.rows = torch.nn.Parameter(torch.zeros(1, width, **kind), requires_grad=False)
        self.register_buffer("scales", torch.zeros(1, **kind))
        self.register_buffer("members", torch.zeros(0, 1, dtype=torch.int64, device=device))
        self.uniform = True  # whether all experts have the same number of components
        self._count, self._used = 0, 1

    def __len__(self) -> int:
        return self._count

    def reserve(self, num_experts: int, num_components: int) -> None:
        """Grows the capacity to this many experts and components in total."""
        self.members = _pad_rows(self.members, num_experts)
        self.scales = _pad_rows(self.scales, 1 + num_components)
        if len(self.rows) < 1 + num_components:
            rows = _pad_rows(self.rows.detach(), 1 + num_components)
            self.rows = torch.nn.Parameter(rows, requires_grad=self.rows.requires_grad)

    def trim(self) -> None:
        """Shrinks the capacity to what is used."""
        self.members, self.scales = self.members[: self._count].clone(), self.scales[: self._used].clone()
        self.rows = torch.nn.Parameter(self.rows.detach()[: self._used].clone(), self.rows.requires_grad)

    def tensors(self) -> list[torch.Tensor]:
        """Everything that holds experts. What belongs to one of them stays the same while others are added."""
        return [self.rows, self.scales, self.members]

    def clear_spare(self) -> None:
        """Zeroes what is beyond the experts of the table, as if none had been added there."""
        with torch.no_grad():
            self.rows[self._used :], self.scales[self._used :], self.members[self._count :] = 0, 0, 0

    def append(self, components: torch.Tensor, scale: float = 1.0) -> None:
        """Adds an expert.

        Args:
            components (`torch.Tensor` of shape `(components, width)`): Its components.
            scale (`float`, *optional*, defaults to 1.0): Scale of each component.
        """
        end = self._used + len(components)
        if end > len(self.rows) or self._count == len(self.members):
            self.reserve(max(self._count + 1, 2 * self._count), max(end, 2 * (self._used - 1) + 1) - 1)
        self.uniform &= self._count == 0 or len(components) == self.members.shape[1]
        if len(components) > self.members.shape[1]:
            missing = len(components) - self.members.shape[1]
            self.members = torch.nn.functional.pad(self.members, (0, missing))
        self.members[self._count, : len(components)] = torch.arange(self._used, end)
        self._count, self._used = self._count + 1, end
        self.write(self._count - 1, components, scale)

    def write(self, index: int, components: torch.Tensor, scale: float = 1.0) -> None:
        """Replaces an expert by one with the same number of components.

        Raises:
            `ValueError`: The number of components differs.
        """
        numbers = self.rows_of(index)
        if len(numbers) != len(components):
            raise ValueError(f"Expert {index} has {len(numbers)} components, not {len(components)}.")
        with torch.no_grad():
            self.rows[numbers] = components.to(self.rows)
            self.scales[numbers] = scale

    def remove(self, index: int) -> None:
        """Zeroes and removes an expert; the following ones move up."""
        numbers = self.rows_of(index)
        with torch.no_grad():
            self.rows[numbers] = 0
            self.scales[numbers] = 0
        self.members = torch.cat([self.members[:index], self.members[index + 1 :]])
        self._count -= 1

    def read(self, index: int) -> torch.Tensor:
        """A copy of one expert's components, of shape `(components, width)`."""
        return self.rows.detach()[self.rows_of(index)]

    def components(self, selection: torch.Tensor) -> torch.Tensor:
        """Row indices of the components of selected experts.

        Args:
            selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Experts of each image.

        Returns:
            integer `torch.Tensor` of shape `(batch, components)`: Padded with 0.
        """
        return self.members[selection].flatten(1)

    def rows_of(self, index: int) -> torch.Tensor:
        """Row indices of one expert's components."""
        numbers = self.members[index]
        return numbers[numbers > 0]


def _pad_rows(tensor: torch.Tensor, height: int) -> torch.Tensor:
    """Pads a tensor with rows of zeros to at least `height` rows."""
    missing = height - len(tensor)
    return tensor if missing <= 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
