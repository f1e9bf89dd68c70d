"""The loop over tasks: cache images, train, fit the router, evaluate, save, push."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DataLoaderConfiguration, set_seed

from ..backbones.precision import go_fast
from ..backbones.views import views_for_sums
from ..config import ConfigError
from ..config.text import get_logger
from ..experts.checkpointing import set_checkpointing
from ..methods.learning import Features, FeaturesOf
from ..model import ContinualModel
from ..reports.costs import timed
from ..reports.report import StreamReport
from ..storage.files import PROCESSOR_NAME
from ..storage.folder import locked
from ..streams import Split, StreamedImages, Task, TaskImages, TaskStream, cache_images, open_images
from ..streams.stream import BorderlessStream
from .arguments import ContinualTrainingArguments
from .callbacks import CallbackList, TrainerCallback
from .checkpoints import Checkpoints, Progress
from .computed import ComputedMetrics
from .console import print_task, waiting
from .environment import describe_environment
from .evaluation import Evaluator, note_results
from .experts_from import Donor
from .features import extract_all
from .fingerprint import describe, note_pictures, same_pictures
from .lesson import Lesson, ParkedLesson
from .output import check_output
from .parallel import LocalAccelerator, ParallelExperts, check_independent
from .pictures import KeepPictures
from .processes import Stop, any_process_stops, cpu_only, explaining_lost_processes, join_processes, same_everywhere
from .progress import progress_bar
from .pushing import Pusher
from .steps import StepLoop, TrainingStopped, stopping_on_signals
from .together import TrainedTogether
from .trackers import Trackers
from .trunk_cache import TrunkCaches


logger = get_logger(__name__)


class ContinualTrainer:
    """Trains a [`ContinualModel`] on tasks one after another with Accelerate, on one or several processes.

    Args:
        model ([`ContinualModel`]): New, or loaded with the tasks learnt so far. Its report is continued.
        args ([`ContinualTrainingArguments`], *optional*): Training arguments.
        callbacks (iterable of [`TrainerCallback`], *optional*): Callbacks, called in this order.
        compute_metrics (callable, *optional*): Metrics of your own, of each task with test images after every task:
            takes a `transformers.EvalPrediction` of logits and class indices, and returns numbers by name; see
            [`ComputedMetrics`]. They are in `report.computed` and, as means over tasks, in logs.

    Raises:
        [`ConfigError`]: The experts of `experts_from` do not fit the model.
        [`HubError`]: With `push_to_hub`: the Hub cannot be reached, denies the request, or holds another model.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, s_prompts
    >>> from hf_clpeft.streams import load_benchmark

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_prompts(prompt_length=2))
    >>> args = ContinualTrainingArguments(output_dir="out", num_train_epochs=1, disable_tqdm=True)
    >>> trainer = ContinualTrainer(model, args)
    >>> stream = load_benchmark("digits", max_train_samples_per_task=32, max_test_samples_per_task=8)
    >>> report = trainer.learn(stream[0])  # as tasks turn up
    >>> report = trainer.learn(stream[1])
    >>> report.tasks
    ['task-000', 'task-001']

    ```
    """

    def __init__(
        self,
        model: ContinualModel,
        args: ContinualTrainingArguments | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
    ):
        args = self.args = args or ContinualTrainingArguments()
        self.callbacks = CallbackList([*callbacks, KeepPictures(args)])
        precision = go_fast(join_processes(args.ddp_timeout).device)
        precision = None if is_initialized() else precision  # a process keeps that of its first trainer
        self.accelerator = Accelerator(
            cpu=cpu_only(),
            mixed_precision=args.mixed_precision or precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
            # Batch sizes are totals, so results do not depend on the number of processes.
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=args.seed
            ),
        )
        self.trackers = Trackers(self.accelerator, args)
        self.model = model.to(self.accelerator.device)
        set_checkpointing(model.backbone, args.gradient_checkpointing)
        chosen = getattr(model.config.method, "expert_layers", None) is not None
        self._compiles = args.torch_compile and not chosen
        if args.torch_compile and chosen:
            logger.warning("torch_compile is left out: with expert_layers, passes start at different layers.")
        if self._compiles:
            model.backbone.compile()
            model.bank.compile()
        self._caches = TrunkCaches(model.bank, args.trunk_cache_gb if chosen else 0)
        compute = None if compute_metrics is None else ComputedMetrics(compute_metrics)
        self.evaluator = Evaluator(self.model, self.accelerator, args, self._caches, compute)
        if model.report is None:
            model.report = StreamReport(model.config.method.name, "stream", {})
            model.report.catch_up(model.config.tasks)
        self.report = model.report
        self._measured = self.report.measured()
        self.evaluator.before = self.report.test_forwards_per_image
        self.report.environment = describe_environment(model, self.accelerator, args, self.report.environment)
        model.config.license = args.license or model.config.license
        self._shows = self.accelerator.is_main_process and not args.disable_tqdm
        self._tests: dict[int, Task] = {}  # tasks with test images, by index in the model
        self._step = 0  # optimizer steps over all tasks, for trackers
        self._fresh = True  # whether this trainer has not learnt a task yet
        self.stop = Stop()  # set by signal handlers
        self._checkpoints = Checkpoints(args.output_dir, args.save_total_limit, self.accelerator.process_index)
        self._parallel = ParallelExperts(args.output_dir, model, args, self._made_with())
        self._donor = None if args.experts_from is None else Donor(args.experts_from, model)
        self._pusher = Pusher(args, model.config) if args.push_to_hub and self.accelerator.is_main_process else None

    def learn_stream(self, stream: TaskStream | BorderlessStream, together: int | None = None) -> StreamReport:
        """Learns the tasks of a stream in order; evaluates, saves and pushes the model after each.

        Args:
            stream ([`TaskStream`] or [`BorderlessStream`]): The tasks. Learnt ones are only evaluated, removed
                ones skipped.
            together (`int`, *optional*): Train the experts of so many tasks at once, in mixed batches, before the
                model takes them up in order. Default: `args.together`.

        Returns:
            [`StreamReport`]: Metrics of all tasks of the model.

        Raises:
            [`ConfigError`]: The model has learnt a task of this name with other classes, `output_dir` holds another
                model, another run is writing into it, or these tasks cannot be trained together.
            [`TrainingError`]: The loss is not finite, or another process died; the model is rolled back to the
                previous task.
            [`TrainingStopped`]: The process received SIGTERM or SIGINT; a checkpoint to resume from is saved.
        """
        together = self.args.together if together is None else replace(self.args, together=together).together
        apart = "task_parallel" if self.args.task_parallel else "together" if together > 1 else None
        self.report.stream, self.report.dataset = stream.name, stream.dataset
        learnt = {known.name: position for position, known in enumerate(self.model.config.tasks)}
        with self._exclusively(), stopping_on_signals(self.stop), explaining_lost_processes(self.accelerator):
            if apart is not None:
                self._train_apart(check_independent(apart, self.model.method, stream, self.accelerator), together)
            for task in stream:
                if any_process_stops(self.stop, self.accelerator):
                    raise TrainingStopped(self.stop.signal)
                if task.name in learnt:
                    self._register(task, learnt[task.name])
                elif task.name in self.model.config.removed:
                    logger.warning("%s was unlearnt and stays so; learn it under another name.", task.name)
                else:
                    self._learn(task)
            if self.accelerator.is_main_process:
                self._parallel.clear()
        self.trackers.close()
        return self.report

    def learn(self, task: Task) -> StreamReport:
        """Learns one task, evaluates on all tasks whose test images this trainer has seen, saves and pushes the model.

        Args:
            task ([`Task`]): The task; see [`load_task`].

        Returns:
            [`StreamReport`]: Metrics of all tasks of the model.

        Raises:
            [`ConfigError`]: `output_dir` holds another model, or another run is writing into it.
            [`ExpertError`]: Another thread is training the model.
            [`TrainingError`]: The loss is not finite, or another process died; the model is rolled back.
        """
        with self._exclusively(), explaining_lost_processes(self.accelerator):
            return self._learn(task)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Locks the output folder and the model, and deletes the checkpoints of other runs."""
        main = self.accelerator.is_main_process
        with locked(self.args.output_dir) if main else nullcontext():
            if main:
                check_output(self.args, self.model.config, new_run=self._fresh)
            if main and self.args.resume_from_checkpoint is None:
                self._checkpoints.clear()
                self._parallel.clear()
            self._fresh = False
            self.accelerator.wait_for_everyone()
            with self.model.method.learning():
                yield

    def _learn(self, task: Task) -> StreamReport:
        args, model, seconds = self.args, self.model, dict[str, float]()
        owner = len(model.config.tasks)
        with self._all_or_nothing():
            self.callbacks("on_task_begin", self.model, task)
            with timed(seconds, "images"):
                with self.accelerator.main_process_first():
                    train = self._open(task.train)
                test = None if task.test is None else self._images(task.test)
            with timed(seconds, "forward_transfer"):
                before = self._evaluate_before(task, test)
            set_seed(args.seed + owner)
            stored = model.method.num_bytes()
            model.start_task(task.name, task.classes, task.domain, args.seed)
            trained_on, trained = describe(task, owner, train), model.method.costs()
            self._train(task, train, seconds, trained_on)
            with model.bank.lock.writing():  # no other thread sees or saves a task before it is in the report
                with timed(seconds, "router"), waiting(f"Finishing {task.name}", self._shows):
                    model.finish_task(self._features_of(task, train, f"Querying {task.name}"), len(train))
                    same_everywhere(model.method, self.accelerator)
                self.report.catch_up(model.config.tasks[:-1])
                self.report.add_task(
                    task.name,
                    model.config.tasks[-1].title,
                    expert_parameters=trained[0],
                    head_parameters=trained[1],
                    stored_bytes=model.method.num_bytes() - stored,
                    train_images_per_second=len(train) * args.num_train_epochs / (seconds.get("train") or math.nan),
                    untrained_accuracy=1 / len(task.classes),
                    seconds=seconds,
                )
            with timed(seconds, "evaluate"):
                if test is not None:
                    self._tests[owner] = task
                    self.evaluator.add(task.name, test)
                self._evaluate(before)
            note_pictures(self.report.environment, task.name, trained_on, test)
            if self._shows:
                print_task(self.report)
            self.callbacks("on_task_end", self.model, task)
        self._save()
        self.accelerator.free_memory()
        return self.report

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Context manager: rolls back model, report and evaluator if a task fails before it is saved."""
        known, report = len(self.model.config.tasks), deepcopy(vars(self.report))
        forwards = self.evaluator.forwards()
        try:
            yield
        except BaseException:
            if len(self.model.config.tasks) > known:
                with self.model.bank.lock.writing():
                    self.model.method.undo()
                    vars(self.report).update(report)
            self._tests.pop(known, None)
            self.evaluator.forget(known, forwards)
            raise

    def _register(self, task: Task, position: int) -> None:
        """Registers a learnt task for evaluation."""
        known = self.model.config.tasks[position]
        if (list(task.classes), task.domain) != (known.classes, known.domain):
            raise ConfigError(
                f"The model has learnt {known.name} with the classes {known.classes} (domain {known.domain}); in this "
                f"stream it has {list(task.classes)} (domain {task.domain}). Go on with the same stream."
            )
        if task.test is not None:
            test = self._images(task.test)
            self._tests[position] = task
            same = same_pictures(self.report.environment, task.name, test)
            self.evaluator.add(task.name, test, position if same and position in self._measured else None)

    def _train_apart(self, stream: TaskStream, together: int) -> None:
        """Trains the experts of all remaining tasks, shared out to processes; the model copies them in order later."""
        todo = self._parallel.todo(stream, self.accelerator.process_index, self.accelerator.num_processes)
        begun = (self._begin_apart(*each, together) for each in todo if not self.stop.is_set())
        TrainedTogether((lesson for lesson in begun if lesson is not None), together).run()
        if self.stop.is_set():
            raise TrainingStopped(self.stop.signal)
        self.model.method.abandon()
        self.accelerator.wait_for_everyone()

    def _begin_apart(self, position: int, task: Task, together: int) -> ParkedLesson | None:
        """Begins the training of a task's expert; `None` if that is stored already."""
        seconds, images, local = dict[str, float](), self._open(task.train), LocalAccelerator(self.accelerator)
        if together > 1 and isinstance(images, StreamedImages):
            raise ConfigError(
                f"Tasks are trained together from cached images, and those of {task.name} are streamed. Leave "
                "streaming and cache_size_gb out, or train one task after another (together=1)."
            )
        trained_on = describe(task, position, images)
        if self._parallel.has(task.name, trained_on):
            return None
        set_seed(self.args.seed + position)
        self.model.start_task(task.name, task.classes, task.domain, self.args.seed)
        with timed(seconds, "train"):
            self._prepare(task, images, local)
        checkpoints = self._parallel.checkpoints(task.name)

        def put(more: float) -> None:
            self._parallel.put(seconds["train"] + more, trained_on)
            checkpoints.clear()

        if len(task.classes) == 1:
            put(0.0)
            return None
        lesson, after_step = self._lesson(task, images, local, checkpoints, trained_on)
        return ParkedLesson(lesson, after_step, self.stop, put)

    def _images(self, split: Split) -> TaskImages:
        """Resized images of a split; the main process writes the Arrow file for all."""
        with self.accelerator.main_process_first():
            return cache_images(split, self.model.backbone.transform, self.args.max_bad_images)

    def _open(self, split: Split) -> TaskImages | StreamedImages:
        args = self.args
        return open_images(split, self.model.backbone.transform, args.max_bad_images, args.cache_size_gb, args.seed)

    def _train(
        self, task: Task, images: TaskImages | StreamedImages, seconds: dict[str, float], trained_on: dict
    ) -> None:
        """Trains the current task, or copies what `task_parallel` or `experts_from` provides."""
        method, queries = self.model.method, None
        if not method.trains:
            return
        if self._parallel.give(seconds, trained_on) or (self._donor is not None and self._donor.give(seconds)):
            return
        if method.trains_by_query and self.args.cache_query_features and isinstance(images, TaskImages):
            with timed(seconds, "queries"):
                queries = self._features_of(task, images, f"Querying {task.name}")(method.query)[0]
        with timed(seconds, "train"):
            self._prepare(task, images, self.accelerator)
            if len(task.classes) > 1:  # with a single class, the loss is always zero
                own = (self.accelerator, self._checkpoints)
                lesson, after_step = self._lesson(task, images, *own, trained_on, queries)
                lesson.run(after_step, self.stop)

    def _prepare(
        self, task: Task, images: TaskImages | StreamedImages, accelerator: Accelerator | LocalAccelerator
    ) -> None:
        self.model.method.eval()
        self.model.method.prepare(self._features_of(task, images, f"Preparing {task.name}", accelerator))

    def _features_of(
        self,
        task: Task,
        images: TaskImages | StreamedImages,
        desc: str,
        accelerator: Accelerator | LocalAccelerator | None = None,
    ) -> FeaturesOf:
        """Extracts features of all training images, or of a sample if they are streamed, for a [`Method`]."""
        accelerator = accelerator or self.accelerator
        stored = images.sample if isinstance(images, StreamedImages) else images
        labels = self._numbers(task)[torch.from_numpy(stored.labels)]
        # Of the task alone: what was learnt before, and may be unlearnt, leaves no trace in the views.
        seed = self.args.seed + crc32(task.name.encode())

        def features_of(features: Features, views: int = 1, kind: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
            drawn = views_for_sums(len(stored), views, kind, seed)
            own = (self.model, accelerator, self.args, desc)
            return extract_all(stored, features, *own, drawn, caches=self._caches), labels

        return features_of

    def _numbers(self, task: Task) -> torch.Tensor:
        """Class indices in the model of a task's classes."""
        classes = self.model.method.classes
        return torch.tensor([classes.index(label) for label in task.classes])

    def _lesson(
        self,
        task: Task,
        images: TaskImages | StreamedImages,
        accelerator: Accelerator | LocalAccelerator,
        checkpoints: Checkpoints,
        trained_on: dict,
        queries: torch.Tensor | None = None,
    ) -> tuple[Lesson, Callable[[Progress, torch.Tensor], None]]:
        """The training of the current task, and what to call after its optimizer steps."""
        args, method = self.args, self.model.method
        if self._compiles and method.bank.slot is not None:
            method.bank.slot.compile()
        made_with = {**self._made_with(), **trained_on, "model": self._state()}
        loop = StepLoop(method, images, accelerator, args, checkpoints, made_with, self._step)
        queries = None if queries is None else queries.to(accelerator.device)
        assert method.task is not None
        desc = f"Training {task.name} ({method.task.title})"
        bar = progress_bar(total=loop.num_steps, desc=desc, disable=not self._shows, leave=False)

        def after_step(progress: Progress, loss: torch.Tensor) -> None:
            bar.update(progress.step - bar.n)
            self._step = max(self._step, progress.logged)
            self.callbacks("on_step_end", self.model, progress.step, loop.num_steps)
            if progress.logged % args.logging_steps == 0:
                value = loss.item()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)  # with the next update
                self._log({"train/loss": value})
            if progress.step == loop.num_steps:
                bar.close()

        return Lesson(self.model, images, loop, accelerator, self._caches, queries), after_step

    def _log(self, values: dict[str, float]) -> None:
        self.trackers.log(values, self._step)
        self.callbacks("on_log", self.model, values, self._step)

    def _made_with(self) -> dict:
        """What must be equal to resume from a checkpoint, besides the arguments."""
        backbone, method = self.model.config.backbone, self.model.method
        return {"method": method.fingerprint(), "backbone": [backbone.weight_hash, backbone.image_size]}

    def _state(self) -> str:
        """Hash of the model as last saved or loaded, from which the training of the current task starts."""
        files = {path: digest for path, digest in self.model.config.files.items() if path != PROCESSOR_NAME}
        return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()

    def _evaluate_before(self, task: Task, test: TaskImages | None) -> float | None:
        """`A[i-1, i]`, for forward transfer, if the model already knows the task's classes."""
        known = set(task.classes) <= set(self.model.config.classes)
        if not self.args.forward_transfer or test is None or not known:
            return None
        self.evaluator.add(task.name, test)
        return self.evaluator.evaluate(task.name, task.classes, owner=None).accuracy

    def _evaluate(self, before: float | None) -> None:
        """Evaluates on all tasks with test images, and updates the report."""
        results = {
            position: self.evaluator.evaluate(task.name, task.classes, position)
            for position, task in sorted(self._tests.items())
        }
        with self.model.bank.lock.writing():  # no other thread saves a partial row
            note_results(self.report, self.model, results, before)
            self.report.test_forwards_per_image = self.evaluator.forwards_per_image()
        found = self.report.summary() | self.report.means()
        self._log({f"eval/{name}": value for name, value in found.items()})
        self.trackers.show(self.report, self._step)
        self.callbacks("on_evaluate", self.model)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            try:
                self.model.save_pretrained(self.args.output_dir, overwrite=self.args.overwrite_output_dir)
            except OSError as error:
                hint = "Mend that, and go on after the last saved task with --resume_from_checkpoint auto."
                raise OSError(error.errno, f"{error.strerror}. {hint}") from error
            self._checkpoints.clear()
            self.callbacks("on_save", self.model, self.args.output_dir)
            if self._pusher is not None:
                self.callbacks("on_push", self.model, *self._pusher.push())
        self.accelerator.wait_for_everyone()
