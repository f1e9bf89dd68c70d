"""The linear classifier: shared by all tasks, or one per task."""

import torch

from ..backbones.precision import KeepsPrecision, in_float32
from ..config import TaskConfig


class Heads(KeepsPrecision):
    """Linear rows over features, kept by the tasks that trained them.

    A *shared* head judges every image by all rows, one per class. A head *per task* judges an image by the rows of the
    task whose expert it went to, so a class has a row in every task that has it. Rows are written once their task is
    trained, and no later task changes them: old logits stay bit-identical. (Only if a later task trains a class of a
    shared head again does the old row go.)

    Rows stay in `float32`, and so do logits, whatever the backbone computes in.

    The row of a task with a single class was compared with no other in training. It judges only the images that went to
    its expert, in a shared head too: such a task is told from the others by its route.

    Args:
        hidden_size (`int`): Width of a feature.
        shared (`bool`): One head for all tasks.

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
        self.weights = torch.nn.ParameterList()  # by task
        self.biases = torch.nn.ParameterList()
        self.classes: list[list[int]] = []  # numbers of the classes of each task's rows
        self.single: list[bool] = []  # whether the task had a single class

    @property
    def num_classes(self) -> int:
        """One more than the highest class number."""
        return 1 + max((number for classes in self.classes for number in classes), default=-1)

    def start(self, classes: list[int]) -> torch.nn.Linear:
        """A layer for the next task to train: rows of a shared head go on where they were, all others start at zero.

        Args:
            classes (`list[int]`): Numbers of the classes to train; the outputs of the layer in this order.

        Returns:
            `torch.nn.Linear`
        """
        layer = torch.nn.Linear(self.hidden_size, len(classes), dtype=torch.float32)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        if self.shared:
            with torch.no_grad():
                for task, numbers in enumerate(self.classes):
                    for old_row, number in enumerate(numbers):
                        if number in classes:
                            row = classes.index(number)
                            layer.weight[row] = self.weights[task][old_row]
                            layer.bias[row] = self.biases[task][old_row]
        return layer

    def write(self, weight: torch.Tensor, bias: torch.Tensor, classes: list[int], single: bool = False) -> None:
        """Keeps the trained rows of the next task.

        Args:
            weight (`torch.Tensor` of shape `(rows, hidden_size)`): Weight of the layer that [`~Heads.start`] gave.
            bias (`torch.Tensor` of shape `(rows,)`): Its bias.
            classes (`list[int]`): Number of the class of each row.
            single (`bool`, *optional*, defaults to `False`): Whether the task has a single class.

        Raises:
            `ValueError`: Shapes do not fit.
        """
        if weight.shape != (len(classes), self.hidden_size) or bias.shape != (len(classes),):
            raise ValueError(
                f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are no rows of width {self.hidden_size} "
                f"for {len(classes)} classes."
            )
        if self.shared and not single:
            for task, numbers in enumerate(self.classes):
                kept = [row for row, number in enumerate(numbers) if number not in set(classes)]
                if len(kept) < len(numbers) and not self.single[task]:
                    self.weights[task] = _fixed(self.weights[task][kept])
                    self.biases[task] = _fixed(self.biases[task][kept])
                    self.classes[task] = [numbers[row] for row in kept]
        self.weights.append(_fixed(weight))
        self.biases.append(_fixed(bias))
        self.classes.append(list(classes))
        self.single.append(single)

    def to_tensors(self, tasks: list[TaskConfig]) -> dict[str, torch.Tensor]:
        """What is saved: the rows of each task by its name, and the numbers of their classes."""
        tensors = {}
        for task, weight, bias, classes in zip(tasks, self.weights, self.biases, self.classes, strict=True):
            tensors[f"{task.name}.weight"], tensors[f"{task.name}.bias"] = weight, bias
            tensors[f"{task.name}.classes"] = torch.tensor(classes, dtype=torch.int64)
        return tensors

    def load(self, tensors: dict[str, torch.Tensor], tasks: list[TaskConfig], num_classes: int) -> None:
        """Inverse of [`~Heads.to_tensors`], into a head that has no rows yet.

        Args:
            tensors (`dict[str, torch.Tensor]`): Content of a file.
            tasks (`list[TaskConfig]`): All tasks of the model.
            num_classes (`int`): How many classes it has.

        Raises:
            `ValueError`: Something does not fit.
        """
        tensors, written = dict(tensors), set()
        for task in tasks:
            names = [f"{task.name}.{part}" for part in ("weight", "bias", "classes")]
            try:
                weight, bias, classes = (tensors.pop(name) for name in names)
                if [tensor.dtype for tensor in (weight, bias, classes)] != [torch.float32, torch.float32, torch.int64]:
                    raise ValueError("rows are float32, and the numbers of their classes int64.")
                numbers = classes.tolist()
                if len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(num_classes)):
                    raise ValueError(f"classes {numbers[:20]} are not among the {num_classes} of the model.")
                self.write(weight, bias, numbers, single=len(task.classes) == 1)
                written |= set(numbers)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"the head of task {task.name!r} does not fit: {error}") from error
        if tensors or len(written) < num_classes:
            raise ValueError(
                f"it has rows for {len(written)} of {num_classes} classes, and {sorted(tensors)[:3]} too many."
            )

    def rows_of(self, task: int, classes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that judge some classes of images which went to the expert of a task.

        Args:
            task (`int`): Its position.
            classes (`list[int]`): Numbers of the classes.

        Returns:
            Weight `(len(classes), hidden_size)` and bias `(len(classes),)`.
        """
        # In a shared head a class may have been trained again, and its row gone to a later task.
        row_of = {
            number: (self.weights[owner][row], self.biases[owner][row])
            for owner in ([task] if not self.shared or self.single[task] else self._judging)
            for row, number in enumerate(self.classes[owner])
        }
        rows = [row_of[number] for number in classes]
        return torch.stack([weight for weight, _ in rows]), torch.stack([bias for _, bias in rows])

    @property
    def _judging(self) -> list[int]:
        """Tasks whose rows of a shared head judge together."""
        return [task for task in range(len(self.classes)) if not self.single[task]]

    def remove(self, task: int, number: dict[int, int]) -> None:
        """Takes a task's rows away.

        Args:
            task (`int`): Its position.
            number (`dict[int, int]`): New number of each class that stays.
        """
        kept = [i for i in range(len(self.classes)) if i != task]
        self.weights = torch.nn.ParameterList([self.weights[i] for i in kept])
        self.biases = torch.nn.ParameterList([self.biases[i] for i in kept])
        self.classes = [[number[old] for old in self.classes[i]] for i in kept]
        self.single = [self.single[i] for i in kept]

    @in_float32
    def forward(self, features: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        """Logits over all classes.

        Args:
            features (`torch.Tensor` of shape `(batch, hidden_size)`): [CLS] features under the expert of each image.
            owners (integer `torch.Tensor` of shape `(batch,)`): Task whose expert that is.

        Returns:
            `torch.Tensor` of shape `(batch, num_classes)`, `float32`: −inf where a task has no such class.
        """
        logits = features.new_full((len(features), self.num_classes), -torch.inf)
        every = torch.arange(len(features), device=features.device)
        together = every
        if self.shared and any(self.single):
            together = every[~torch.tensor(self.single, device=features.device)[owners]]
        for task in range(len(self.classes)) if self.shared else owners.unique().tolist():
            rows = together if self.shared and not self.single[task] else every[owners == task]
            columns = torch.tensor(self.classes[task], dtype=torch.int64, device=features.device)
            logits[rows[:, None], columns] = torch.nn.functional.linear(
                features[rows], self.weights[task], self.biases[task]
            )
        return logits


def _fixed(rows: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(rows.detach().to(torch.float32, copy=True), requires_grad=False)
