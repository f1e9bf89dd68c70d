"""MOS: experts that start from those before, one aligned head, and a prediction that corrects its choice of expert."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backbones import Backbone
from ..backbones.precision import without_autocast
from ..backbones.tracing import tracing
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..config.checks import check_ranges
from ..experts.expert import Expert
from ..routing import ClassRouter
from .alignment import AlignedHeads, ClassGaussians, align
from .learning import Batch, FeaturesOf
from .method import Method
from .options import LoraOptions, QueryOptions
from .output import ContinualOutput
from .s_x import PerTask


class Mos(PerTask, name="mos"):
    """MOS, model surgery; arXiv 2412.09441.

    **Trains** a LoRA adapter per task, which starts from the one before and is pulled towards the mean of all before
    at every step, and the head rows of its classes. Then the rows of all classes are trained on features sampled from
    class Gaussians. **Stores** an adapter per task, one head, and a mean of frozen features and a Gaussian per class
    and task, `hidden_size` squared numbers. **Costs** one forward pass per image for the frozen features, and one for
    each expert that is asked, at most `hops`.

    An image is first read by the expert of the class whose mean is nearest to its frozen features. The head names a
    class; if it belongs to another task, that task's expert reads the image next. The probabilities of the last head
    output and of the class means are averaged.

    It differs from the paper in this:

    - Adapters are LoRA modules on attention, where the paper has a bottleneck beside each MLP.
    - A class of several tasks leads to the expert whose mean of it is nearest, unless the present one knows it.
    - The authors' code merges adapters in every layer of every forward pass, so that one step pulls by 0.7 rather than
      0.1, and in testing, too. Here they are merged once a step, as the paper has it.
    - The authors' code adds a loss that keeps features of a batch and old class means apart; the paper has none.
    - The head is aligned in 5 passes at a learning rate of 0.1, where the code has 30 at 0.005.
    - Covariances are shrunk, as [`ClassGaussians`] says.
    - With `experts_from`, experts are taken as they are, and neither start from another nor are merged.
    """

    title, paper, chained = "MOS", "2412.09441", True
    experts = "one LoRA expert per task, started from the one before; an image may pass through several"
    which_head = "shared"
    router: ClassRouter
    heads: AlignedHeads

    @dataclass
    class Config(QueryOptions, LoraOptions):
        router = "class_means"
        momentum: float = field(
            default=0.1, metadata={"help": "How far a step pulls an adapter towards the mean of those before."}
        )
        hops: int = field(default=4, metadata={"help": "Experts that may be asked about one image, one by one."})

        def __post_init__(self) -> None:
            super().__post_init__()
            check_ranges(self, momentum=(0, 1), hops=(1, 100))

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.heads = AlignedHeads(backbone.hidden_size)
        self.gaussians = ClassGaussians(backbone.hidden_size)

    def forward(
        self,
        pixels: Any,
        query: torch.Tensor | None = None,
        read: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        expert: int | None = None,
    ) -> ContinualOutput:
        with self.bank.sharing():
            query = self.query(pixels) if query is None else query
            with without_autocast(query.device):
                routing = self.route(query.float())
                assert routing.scores is not None
                prototypes = self.router.class_scores(routing.scores)
            selection = (routing if expert is None else routing.sent_to(expert)).selection.clone()
            logits, rows = torch.empty_like(prototypes), torch.arange(query.shape[0], device=query.device)
            for _ in range(self.options.hops if expert is None else 1):
                if read is None:
                    features = self.read(self.bank.take(pixels, rows), selection[rows])
                else:  # a feature cache expects all images; those whose expert stays the same cost it nothing
                    features = read(pixels, selection)[rows]
                logits[rows] = self.heads(features, selection[rows])
                asked, selection = selection, selection.clone()
                selection[rows] = self.next_expert(logits[rows].argmax(dim=1), asked[rows], routing.scores[rows])
                if tracing():  # a graph reads every image as often, which changes nothing once its expert stays
                    continue
                rows = (selection != asked).nonzero()[:, 0]
                if not len(rows):
                    break
        # As in the paper, the temperature of the class means falls with the number of tasks.
        mean = (logits.softmax(dim=1) + (self.router.num_owners * prototypes).softmax(dim=1)) / 2
        return ContinualOutput(mean.log(), asked, routing.distances)

    def next_expert(self, classes: torch.Tensor, asked: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The expert of a predicted class: the one that predicted it if it knows it, else that of the nearest mean.

        Args:
            classes (integer `torch.Tensor` of shape `(batch,)`): Predicted classes.
            asked (integer `torch.Tensor` of shape `(batch,)`): Experts that predicted them.
            scores (`torch.Tensor` of shape `(batch, entries)`): Similarity to the class means of every task.

        Returns:
            integer `torch.Tensor` of shape `(batch,)`.
        """
        owners, known = self.router.owners, self.router.classes == classes[:, None]
        scores = scores.masked_fill(~known, -torch.inf).masked_fill(known & (owners == asked[:, None]), torch.inf)
        return owners[scores.argmax(dim=1)]

    def begin(self, task: TaskConfig) -> None:
        super().begin(task)
        self._mean: list[torch.Tensor] = []  # of the adapters before
        earlier = list(self.bank)
        if earlier:
            means = {key: torch.stack([one.tensors[key] for one in earlier]).mean(dim=0) for key in earlier[0].tensors}
            self.bank.adopt(Expert("mean", earlier[0].config, means))
            self._mean = [parameter.detach().clone() for parameter in self._adapter()]
            self.bank.adopt(earlier[-1])

    def loss(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            for parameter, mean in zip(self._adapter() if self._mean else [], self._mean, strict=True):
                if parameter.grad is None:  # the first part of the batch of a step
                    parameter.lerp_(mean, self.options.momentum)
        return super().loss(batch)

    def end(self, features_of: FeaturesOf) -> None:
        assert self.task is not None
        query = features_of(self.query)
        self.bank.finish(self.task.name)
        newest = len(self.bank) - 1

        def features(pixels: torch.Tensor) -> torch.Tensor:
            return self.bank(pixels, torch.full((len(pixels),), newest, device=pixels.device))

        self.gaussians.learn(*features_of(features))
        head = self.heads.extended(self._head.weight, self._head.bias, self.numbers)
        del self._head, self._mean
        if self.config.tasks:
            align(head, self.gaussians, self.seed)
        self.heads.write(head.weight, head.bias, list(range(len(self.classes))))
        self.router.learn(*query, seed=self.seed)

    def take(self, giver: Method, position: int) -> None:
        assert isinstance(giver, PerTask) and self.task is not None
        self.bank.adopt(giver.bank[position])
        # Other tasks of the giver may have trained these rows, too, but alignment trains all of them again.
        rows = giver.heads.rows_of(position, [giver.classes.index(label) for label in self.task.classes])
        with torch.no_grad():
            for own, given in zip((self._head.weight, self._head.bias), rows, strict=True):
                own.copy_(given)

    def check(self) -> None:
        super().check()
        self.gaussians.check(len(self.config.tasks), len(self.config.classes))

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        raise ConfigError(f"The head of {self.name} is trained for all tasks together; none can be removed exactly.")

    def alike(self) -> dict[str, Any]:
        raise ConfigError(f"is of the method {self.name}, whose head is trained for all tasks together")

    def _adapter(self) -> list[torch.nn.Parameter]:
        """Parameters of the adapter in training."""
        assert self.bank.slot is not None
        return [parameter for parameter in self.bank.slot.parameters() if parameter.requires_grad]
