"""The training loop of one task, resumable from checkpoints."""

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from ..backbones.views import draw_views, views_for_sums
from ..config.text import get_logger
from ..methods import Batch, Method
from ..streams import StreamedImages, StreamError, TaskImages
from .arguments import ContinualTrainingArguments
from .batches import Share, make_batches
from .checkpoints import Checkpoints, Progress, pack_optimizer, set_random_state, unpack_optimizer
from .processes import Stop, TrainingError, any_process_stops


logger = get_logger(__name__)

STOP_STEPS = 10  # interval at which several processes synchronise whether to stop


class TrainingStopped(KeyboardInterrupt):
    """Training was stopped by a signal, after saving a checkpoint.

    Args:
        signal (`int`, *optional*, defaults to SIGINT): The signal.
    """

    def __init__(self, signal: int = signal.SIGINT):
        super().__init__()
        self.signal = signal


class Step(torch.nn.Module):
    """Wraps [`Method.loss`] as a forward pass for DDP, with the trainable parameters only.

    Args:
        method ([`Method`]): The method, after [`~Method.begin`].
        args ([`ContinualTrainingArguments`]): For [`~Method.parameter_groups`].
    """

    def __init__(self, method: Method, args: ContinualTrainingArguments):
        super().__init__()
        self._method = (method,)  # not a submodule: DDP would broadcast all of its state
        self.groups = method.parameter_groups(args)
        self.trained = torch.nn.ParameterList([parameter for group in self.groups for parameter in group["params"]])

    def forward(
        self, pixels: torch.Tensor, labels: torch.Tensor, query: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the losses of a [`Batch`]; `weight` has shape `(batch,)`."""
        losses = self._method[0].loss(Batch(pixels, labels, query))
        return losses @ weight if losses.dim() else losses * weight.sum()

    def train(self, mode: bool = True) -> "Step":
        """Sets the mode of the method as well."""
        self._method[0].train(mode)
        return super().train(mode)


class StepLoop:
    """The training loop of one task.

    Args:
        method ([`Method`]): The method, after [`~Method.begin`].
        images ([`TaskImages`] or [`StreamedImages`]): Training images.
        accelerator (`accelerate.Accelerator`): Shards the batches.
        args ([`ContinualTrainingArguments`]): Training arguments.
        checkpoints ([`Checkpoints`]): Where to save checkpoints and to resume from.
        made_with (`dict`): What must be equal to resume from a checkpoint, besides the arguments.
        logged (`int`, *optional*, defaults to 0): Optimizer steps of earlier tasks.
    """

    def __init__(
        self,
        method: Method,
        images: TaskImages | StreamedImages,
        accelerator: Accelerator,
        args: ContinualTrainingArguments,
        checkpoints: Checkpoints,
        made_with: dict,
        logged: int = 0,
    ):
        from transformers import get_scheduler

        assert method.task is not None
        self.accelerator, self.args, self.checkpoints = accelerator, args, checkpoints
        step = Step(method, args)
        self.trained, self._method = [*step.trained], method
        groups = step.groups
        optimizer: torch.optim.Optimizer
        if args.optim == "adamw":
            fused = True if accelerator.device.type == "cuda" else None
            optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=fused)
        else:
            optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)
        self.batches = make_batches(images, args, accelerator)
        self.module, self.optimizer = accelerator.prepare(step, optimizer)
        self.num_steps = args.num_steps(len(self.batches))
        scheduler = get_scheduler(
            args.lr_scheduler_type, self.optimizer, round(args.warmup_ratio * self.num_steps), self.num_steps
        )
        self.scheduler = accelerator.prepare(scheduler)
        self._unusable = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self._views = self._fixed_views(images)
        sizes = {"images": len(images), "num_processes": accelerator.num_processes}
        self.progress = Progress(method.task.name, {**args.decisive(), **sizes, **made_with}, logged=logged)

    def run(
        self,
        loss_of: Callable[[torch.nn.Module, dict], torch.Tensor],
        after_step: Callable[[Progress, torch.Tensor], None],
        stop: Stop,
    ) -> None:
        """Runs all remaining steps.

        Args:
            loss_of (callable): Computes the weighted sum of losses, given the prepared [`Step`] and a batch.
            after_step (callable): Called after each optimizer step with the progress and the loss.
            stop ([`Stop`]): Stops after the current step when set.

        Raises:
            [`TrainingStopped`]: `stop` was set.
            [`TrainingError`]: The loss is not finite, or a batch does not fit into memory.
        """
        gradients = Gradients(lambda parts: [loss_of(self.module, part) for part in parts.values()], self.accelerator)
        with closing(self.steps(after_step, stop)) as steps:
            batch = next(steps, None)
            while batch is not None:
                (loss,) = gradients([batch], self.trained)
                try:
                    batch = steps.send(loss)
                except StopIteration:
                    return

    def steps(
        self, after_step: Callable[[Progress, torch.Tensor], None], stop: Stop
    ) -> Generator[dict[str, torch.Tensor], torch.Tensor, None]:
        """Yields every batch, and takes its loss once its gradients are there; arguments as for [`~StepLoop.run`]."""
        restore_random, position = self._restore()
        accelerator, args, progress = self.accelerator, self.args, self.progress
        self.module.train()
        while progress.epoch < args.num_train_epochs:
            for batch, share in self.batches.read(progress.epoch, progress.batch, position):
                restore_random()  # after the loader was created, which advances the generators
                restore_random = _nothing
                self._complete(batch, share)
                with accelerator.accumulate(self.module):
                    loss = yield batch
                    if accelerator.sync_gradients and args.max_grad_norm:
                        accelerator.clip_grad_norm_(self.trained, args.max_grad_norm)
                    if accelerator.sync_gradients:
                        self.optimizer.step()
                        self.scheduler.step()
                        self.optimizer.zero_grad()
                self._unusable |= ~loss.isfinite()
                progress.batch += 1
                if accelerator.sync_gradients:
                    progress.step, progress.logged = progress.step + 1, progress.logged + 1
                    after_step(progress, loss)
                    self._save_or_stop(stop)
            progress.epoch, progress.batch, position = progress.epoch + 1, 0, None
        self.module.eval()

    @property
    def view(self) -> int | None:
        """Which of their fixed views the images of this epoch are taken in, 0 as they are; `None` if it is random."""
        if not self._views:
            return 0 if self.args.augmentation == "none" else None
        return self.progress.epoch % len(self._views)

    def _fixed_views(self, images: TaskImages | StreamedImages) -> list[torch.Tensor | None]:
        """Views that epochs take in turn, of all images each; none if they are drawn anew in every step."""
        args, device = self.args, self.accelerator.device
        if args.augmentation_views and isinstance(images, StreamedImages):
            raise StreamError(
                f"{images.split.title}: images that are streamed cannot keep their {args.augmentation_views} views. "
                "Leave out augmentation_views, or streaming and cache_size_gb."
            )
        found = views_for_sums(len(images), args.augmentation_views, args.augmentation, args.seed)
        return [None if view is None else view.to(device) for view in found[: args.augmentation_views]]

    def _complete(self, batch: dict[str, torch.Tensor], share: Share) -> None:
        """Adds the weights and the augmentations of a batch."""
        length, device = len(batch["label"]), self.accelerator.device
        batch["weight"] = share.weights(length, self.accelerator.num_processes).to(device, non_blocking=True)
        if self.view is None:
            views = draw_views(share.total, self.args.augmentation, device)
            assert views is not None
            batch["view"] = share.own(views, length)
        elif self._views and (fixed := self._views[self.view]) is not None:
            batch["view"] = fixed[batch["index"]]

    def _save_or_stop(self, stop: Stop) -> None:
        progress, every = self.progress, self.args.save_steps
        last = progress.step == self.num_steps
        due = last or (every and progress.step % every == 0)
        if due or progress.step % self.args.logging_steps == 0:  # synchronises with the device
            self._check_finite()
        if last:
            return
        alone = self.accelerator.num_processes == 1
        stopping = (alone or progress.step % STOP_STEPS == 0) and any_process_stops(stop, self.accelerator)
        if stopping or due:
            self._check_finite()
            self._save()
        if stopping:
            raise TrainingStopped(stop.signal)

    def _check_finite(self) -> None:
        if self._unusable:
            raise TrainingError(
                f"The loss of {self.progress.task} was not finite at step {self.progress.step} or just before. The "
                "model is as it was after the task before. Lower learning_rate or head_learning_rate, or train in "
                "bf16 or float32 if this was fp16."
            )

    def _save(self) -> None:
        tensors, optimizer = pack_optimizer(self.optimizer)
        weights = {f"weights.{name}": value for name, value in self._weights().items()}
        scaler = self.accelerator.scaler
        values = {
            "optimizer": optimizer,
            "scheduler": {name: value for name, value in self.scheduler.state_dict().items() if name != "lr_lambdas"},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        position = self.batches.position(self.progress.batch)
        self.checkpoints.save(self.progress, weights | tensors, values, position, self.accelerator.wait_for_everyone)

    def _restore(self) -> tuple[Callable[[], None], dict | None]:
        """Restores the newest checkpoint of the task, if any.

        Returns:
            Function that restores the random state, and position in the images.
        """
        found = self.checkpoints.latest(self.progress)
        if found is None:
            return _nothing, None
        self.progress, tensors, values, position, random_state = found
        with torch.no_grad():
            for name, parameter in self._weights().items():
                parameter.copy_(tensors[f"weights.{name}"])
        self.optimizer.load_state_dict(unpack_optimizer(tensors, values["optimizer"]))
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **values["scheduler"]})
        if values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        if self.progress.batch < len(self.batches):
            return lambda: set_random_state(*random_state), position
        self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0
        set_random_state(*random_state)  # before the loader of the next epoch is created
        return _nothing, None

    def _weights(self) -> dict[str, torch.Tensor]:
        """State that optimizer steps change: trainable parameters, and buffers that the loss may update."""
        buffers = self._method.named_buffers()
        kept = {name: buffer for name, buffer in buffers if not name.startswith(("bank.", "router.", "heads."))}
        return kept | {str(number): parameter for number, parameter in enumerate(self.trained)}


class Gradients:
    """Adds up the gradients of batches, in parts that fit into memory: of one task, or of several in one pass.

    Args:
        losses_of (callable): Computes a list of losses, given a part of each of some batches, by number of the batch.
        accelerator (`accelerate.Accelerator`): Runs the backward pass.
    """

    def __init__(self, losses_of: Callable[[dict[int, dict]], list[torch.Tensor]], accelerator: Accelerator):
        self._losses_of, self._accelerator = losses_of, accelerator
        self._num_parts = 1

    def __call__(self, batches: list[dict], trained: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Adds to the gradients of the trained parameters; returns the loss of each batch.

        Raises:
            [`TrainingError`]: A batch does not fit into memory.
        """
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]
        while True:
            try:
                return self._in_parts(batches)
            except torch.OutOfMemoryError as error:
                count = max(len(batch["label"]) for batch in batches)
                if self._accelerator.num_processes > 1 or self._num_parts >= count:
                    fewer = f", or train fewer than {len(batches)} tasks together" if len(batches) > 1 else ""
                    raise TrainingError(
                        f"The device has too little memory for a batch of {count} images. Lower train_batch_size and "
                        f"raise gradient_accumulation_steps as much: the batch stays the same in effect{fewer}."
                    ) from error
            self._num_parts *= 2
            logger.warning("Out of memory: going on with batches in %d parts, added up.", self._num_parts)
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _in_parts(self, batches: list[dict]) -> list[torch.Tensor]:
        losses = [torch.zeros((), device=self._accelerator.device) for _ in batches]
        cut = [list(_cut(batch, self._num_parts)) for batch in batches]
        for number in range(max(map(len, cut))):
            parts = {place: of_batch[number] for place, of_batch in enumerate(cut) if number < len(of_batch)}
            found = self._losses_of(parts)
            self._accelerator.backward(found[0] if len(found) == 1 else torch.stack(found).sum())
            for place, loss in zip(parts, found, strict=True):
                losses[place] += loss.detach()
        return losses


def _nothing() -> None:
    pass


def _cut(batch: dict[str, torch.Tensor], num_parts: int) -> Iterator[dict[str, torch.Tensor]]:
    size = -(-len(batch["label"]) // num_parts)
    for start in range(0, len(batch["label"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


@contextmanager
def stopping_on_signals(stop: Stop) -> Iterator[None]:
    """Context manager: SIGTERM and SIGINT set `stop`; a second signal ends the process as usual.

    Signals can be handled only in the main thread; in other threads this does nothing.
    """
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        stop.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
