"""The linear classifier: one head shared by all tasks, or one per task."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, islice

import torch

from ..backbones.precision import KeepsPrecision, in_float32
from ..backbones.tracing import tracing
from ..config import TaskConfig


MOST_AT_ONCE = 2**24  # numbers of the rows that are gathered for a part of a batch

# Of a task: weight, bias, class indices, and whether it has a single class.
Rows = tuple[torch.Tensor, torch.Tensor, list[int], bool]


class Heads(KeepsPrecision):
    """Linear classifier whose rows belong to the tasks that trained them.

    A *shared* head applies all rows to every image, one per class. A *per-task* head applies only the rows of the task
    to whose expert an image is routed, so a class has one row per task. Rows are frozen when their task ends, so old
    logits stay bit-identical; only if a later task trains a class of a shared head again is the old row dropped.

    The row of a single-class task was not trained against other classes. So it applies only to images that are routed
    to its expert, in a shared head, too.

    Rows and logits are `float32`, whatever the dtype of the backbone.

    Args:
        hidden_size (`int`): Size of a feature vector.
        shared (`bool`): Whether all tasks share one head.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.heads import Heads

    >>> heads = Heads(hidden_size=2, shared=False)
    >>> heads.write(torch.eye(2), torch.zeros(2), classes=[0, 1])
    >>> heads.write(torch.eye(2), torch.zeros(2), classes=[2, 3])
    >>> heads(torch.ones(1, 2), owners=torch.tensor([1])).isfinite().tolist()
    [[False, False, True, True]]

    ```
    """

    def __init__(self, hidden_size: int, shared: bool):
        super().__init__()
        self.hidden_size, self.shared = hidden_size, shared
        # The rows of all tasks are one tensor: thousands of small ones take longer to look through than to copy.
        self.weight = torch.nn.Parameter(torch.zeros(0, hidden_size, dtype=torch.float32), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(0, dtype=torch.float32), requires_grad=False)
        self._starts = [0]  # the first row of each task
        self.classes: list[list[int]] = []  # class indices of each task's rows
        self.single: list[bool] = []  # whether the task had a single class
        self._placed: tuple[tuple[torch.device, bool], list[torch.Tensor]] | None = None  # see `_place`
        self.num_classes = 0  # one more than the highest class index

    @property
    def weights(self) -> Sequence[torch.Tensor]:
        """Weight of each task's rows."""
        return self.weight.split([*map(len, self.classes)]) if self.classes else ()

    @property
    def biases(self) -> Sequence[torch.Tensor]:
        """Bias of each task's rows."""
        return self.bias.split([*map(len, self.classes)]) if self.classes else ()

    def _rows(self, task: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of one task's rows."""
        rows = slice(*self._starts[task : task + 2])
        return self.weight[rows], self.bias[rows]

    def start(self, classes: list[int]) -> torch.nn.Linear:
        """A layer for the next task to train. Existing rows of a shared head are copied, all others start at zero.

        Args:
            classes (`list[int]`): Class indices, in the order of the layer's outputs.

        Returns:
            `torch.nn.Linear`
        """
        layer = torch.nn.Linear(self.hidden_size, len(classes), dtype=torch.float32)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        if self.shared:
            flat = [number for numbers in self.classes for number in numbers]
            with torch.no_grad():
                for old_row, number in enumerate(flat):
                    if number in classes:
                        row = classes.index(number)
                        layer.weight[row], layer.bias[row] = self.weight[old_row], self.bias[old_row]
        return layer

    def write(self, weight: torch.Tensor, bias: torch.Tensor, classes: list[int], single: bool = False) -> None:
        """Appends the trained rows of the next task.

        Args:
            weight (`torch.Tensor` of shape `(rows, hidden_size)`): Weight of the layer from [`~Heads.start`].
            bias (`torch.Tensor` of shape `(rows,)`): Its bias.
            classes (`list[int]`): Class index of each row.
            single (`bool`, *optional*, defaults to `False`): Whether the task has a single class.

        Raises:
            `ValueError`: Shapes do not match.
        """
        self.extend([(weight, bias, classes, single)])

    def extend(self, tasks: Iterable[Rows]) -> None:
        """Appends the rows of several tasks, with the arguments and errors of [`~Heads.write`] for each."""
        tasks, weights, biases, num_classes = list(tasks), [*self.weights], [*self.biases], self.num_classes
        for weight, bias, classes, _ in tasks:
            self._check(weight, bias, classes)
        for weight, bias, classes, single in tasks:
            if self.shared and not single and any(number < num_classes for number in classes):  # else all are new
                self._drop(set(classes), weights, biases)
            num_classes = max([num_classes, *(1 + number for number in classes)])
            weights.append(weight)
            biases.append(bias)
            self.classes.append(list(classes))
            self.single.append(single)
        self.num_classes = num_classes
        self._set(weights, biases)

    def _check(self, weight: torch.Tensor, bias: torch.Tensor, classes: list[int]) -> None:
        if weight.shape != (len(classes), self.hidden_size) or bias.shape != (len(classes),):
            raise ValueError(
                f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are no rows of width {self.hidden_size} "
                f"for {len(classes)} classes."
            )

    def _drop(self, trained: set[int], weights: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
        """Drops the rows of classes of a shared head that are trained again."""
        for task, numbers in enumerate(self.classes):
            if not (self.single[task] or trained.isdisjoint(numbers)):
                kept = [row for row, number in enumerate(numbers) if number not in trained]
                weights[task], biases[task] = weights[task][kept], biases[task][kept]
                self.classes[task] = [numbers[row] for row in kept]

    def _set(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        """Copies the rows of all tasks."""
        self._placed, self._starts = None, [0, *accumulate(map(len, weights))]
        with torch.no_grad():
            self.weight, self.bias = (
                torch.nn.Parameter(torch.cat([own[:0], *(part.to(own) for part in parts)]), requires_grad=False)
                for own, parts in ((self.weight, weights), (self.bias, biases))
            )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """State dict: weight, bias and class index of the rows of all tasks, and how many each task has."""
        flat = [number for numbers in self.classes for number in numbers]
        counts = [*map(len, self.classes)]
        lists = {"classes": torch.tensor(flat, dtype=torch.int64), "counts": torch.tensor(counts, dtype=torch.int64)}
        return {"weight": self.weight, "bias": self.bias, **lists}

    def load(self, tensors: dict[str, torch.Tensor], tasks: list[TaskConfig], num_classes: int) -> None:
        """Inverse of [`~Heads.to_tensors`], for a head without rows.

        Args:
            tensors (`dict[str, torch.Tensor]`): State dict, from a file; before version 3 of the format, it had
                weight, bias and classes by task name.
            tasks (`list[TaskConfig]`): All tasks of the model.
            num_classes (`int`): Number of classes of the model.

        Raises:
            `ValueError`: A tensor is missing, unexpected, or does not match.
        """
        read, known = self._by_task(tensors, tasks), range(num_classes)
        for task, (weight, bias, numbers, _) in zip(tasks, read, strict=True):
            try:
                self._check(weight, bias, numbers)
                if len(set(numbers)) < len(numbers) or not all(number in known for number in numbers):
                    raise ValueError(f"classes {numbers[:20]} are not among the {num_classes} of the model.")
            except ValueError as error:
                raise ValueError(f"the head of task {task.name!r} does not fit: {error}") from error
        if len(written := {number for _, _, numbers, _ in read for number in numbers}) < num_classes:
            raise ValueError(f"it has rows for {len(written)} of {num_classes} classes.")
        self.extend(read)

    def _by_task(self, tensors: dict[str, torch.Tensor], tasks: list[TaskConfig]) -> list[Rows]:
        """The rows of each task in a state dict."""
        kinds = {"weight": (torch.float32, 2), "bias": (torch.float32, 1), "classes": (torch.int64, 1)}
        wanted = {**kinds, "counts": (torch.int64, 1)}
        together = tensors.keys() == wanted.keys()
        if not together:
            wanted = {f"{task.name}.{part}": kind for task in tasks for part, kind in kinds.items()}
        missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        if missing or unknown:
            raise ValueError(f"it lacks {missing[:3]}, and has {unknown[:3]} too many.")
        for name, tensor in tensors.items():
            if (tensor.dtype, tensor.dim()) != wanted[name]:
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}.")
        single = [len(task.classes) == 1 for task in tasks]
        if not together:
            weights, biases, classes = ([tensors[f"{task.name}.{part}"] for task in tasks] for part in kinds)
            return [*zip(weights, biases, (numbers.tolist() for numbers in classes), single, strict=True)]
        counts, flat = tensors["counts"].tolist(), tensors["classes"].tolist()
        if len(counts) != len(tasks) or min(counts, default=0) < 0 or sum(counts) != len(flat):
            raise ValueError(f"it has {len(flat)} rows, which are not those of {len(tasks)} tasks.")
        if not len(tensors["weight"]) == len(tensors["bias"]) == len(flat):
            raise ValueError("weight, bias and classes have different numbers of rows.")
        if not counts:  # of a model without tasks, and torch splits nothing into no parts
            return []
        split, rest = (tensors["weight"].split(counts), tensors["bias"].split(counts)), iter(flat)
        return [*zip(*split, ([*islice(rest, count)] for count in counts), single, strict=True)]

    def rows_of(self, task: int, classes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that are applied for given classes to images routed to the expert of a task.

        Args:
            task (`int`): Index of the task.
            classes (`list[int]`): Class indices.

        Returns:
            Weight `(len(classes), hidden_size)` and bias `(len(classes),)`.
        """
        # In a shared head, the row of a class may belong to a later task that has trained it again.
        together = [number for number in range(len(self.classes)) if not self.single[number]]
        row_of = {
            number: (weight, bias)
            for owner in ([task] if not self.shared or self.single[task] else together)
            for number, weight, bias in zip(self.classes[owner], *self._rows(owner), strict=True)
        }
        rows = [row_of[number] for number in classes]
        return torch.stack([weight for weight, _ in rows]), torch.stack([bias for _, bias in rows])

    def remove(self, task: int, number: dict[int, int]) -> None:
        """Removes the rows of a task.

        Args:
            task (`int`): Index of the task.
            number (`dict[int, int]`): Maps old to new indices of the remaining classes.
        """
        kept = [i for i in range(len(self.classes)) if i != task]
        weights, biases = self.weights, self.biases
        self._set([weights[i] for i in kept], [biases[i] for i in kept])
        self.classes = [[number[old] for old in self.classes[i]] for i in kept]
        self.single = [self.single[i] for i in kept]
        self.num_classes = 1 + max((row for rows in self.classes for row in rows), default=-1)

    @in_float32
    def forward(self, features: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        """Logits over all classes.

        Args:
            features (`torch.Tensor` of shape `(batch, hidden_size)`): Features with each image's expert applied.
            owners (integer `torch.Tensor` of shape `(batch,)`): Task to whose expert each image is routed.

        Returns:
            `torch.Tensor` of shape `(batch, num_classes)`, `float32`: −inf for classes without an applicable row.
        """
        # Without reading on the CPU which tasks the images were routed to: a GPU would have to be waited for.
        where = features.device, self.shared
        placed = self._placed
        if tracing():  # rows are stand-ins, which must not stay
            placed = where, self._place(features.device)
        elif placed is None or placed[0] != where:
            placed = self._placed = where, self._place(features.device)
        columns, *rows = placed[1]
        found = self._shared(features, owners, *rows) if self.shared else self._per_task(features, owners, *rows)
        shape = features.shape[0], self.num_classes + 1  # the last one is of no class
        logits = features.new_full(shape, -torch.inf)
        columns = columns.expand_as(found) if self.shared else columns[owners]
        return logits.scatter_reduce(1, columns, found, "amax")[:, :-1]

    def _place(self, device: torch.device) -> list[torch.Tensor]:
        """What [`~Heads.forward`] needs on a device: the class of every row, and rows by task or what selects them."""
        if self.shared:
            owners = [task if self.single[task] else -1 for task, numbers in enumerate(self.classes) for _ in numbers]
            flat = [number for numbers in self.classes for number in numbers]
            lists: list[list] = [flat, owners, self.single]
            return [torch.tensor(numbers).to(device, non_blocking=True) for numbers in lists]
        # Tasks with fewer rows than others get rows of no class.
        most = max(map(len, self.classes), default=0)
        padded = [[*numbers, *[self.num_classes] * (most - len(numbers))] for numbers in self.classes]
        columns = torch.tensor(padded, dtype=torch.int64).to(device, non_blocking=True)
        return [columns, *(torch.nn.utils.rnn.pad_sequence([*rows], True) for rows in (self.weights, self.biases))]

    def _shared(
        self, features: torch.Tensor, owners: torch.Tensor, row_owners: torch.Tensor, single: torch.Tensor
    ) -> torch.Tensor:
        rows = zip(self.weights, self.biases, strict=True)
        found = torch.cat([torch.nn.functional.linear(features, weight, bias) for weight, bias in rows], dim=1)
        if not any(self.single):
            return found
        wanted = torch.where(single[owners], owners, -1)
        return found.masked_fill(row_owners != wanted[:, None], -torch.inf)

    def _per_task(
        self, features: torch.Tensor, owners: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor
    ) -> torch.Tensor:
        if tracing():  # one product for all rows is smaller than a copy of an image's own
            every = torch.einsum("bd,trd->btr", features, weights) + biases
            return every.gather(1, owners[:, None, None].expand(-1, 1, biases.shape[1])).squeeze(1)
        if features.device.type == "cpu":  # where nothing waits, products have the bits that they always had
            logits = features.new_zeros(len(features), biases.shape[1])
            for task in owners.unique().tolist():
                rows = owners == task
                own = torch.nn.functional.linear(features[rows], *self._rows(task))
                logits[rows, : own.shape[1]] = own
            return logits
        at_once = max(1, MOST_AT_ONCE // max(1, weights[0].numel()))
        parts = zip(features.split(at_once), owners.split(at_once), strict=True)
        # Not a matrix product, whose rounding would depend on the number of rows of other tasks.
        found = [(weights[tasks] * rows[:, None]).sum(dim=-1) + biases[tasks] for rows, tasks in parts]
        return torch.cat(found)
