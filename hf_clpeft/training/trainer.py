"""The loop over tasks: cache images, train the expert, teach the router, evaluate, save, push."""

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from tqdm.auto import tqdm

from ..config.errors import ConfigError
from ..config.text import get_logger
from ..hub.errors import HubError
from ..hub.outbox import Outbox
from ..hub.push import PushTarget
from ..methods.learners import ExpertLearner, FrozenLearner, TaskLearner
from ..model import ContinualModel
from ..reports.report import StreamReport
from ..routing.prototypes import fit_prototypes, fit_thresholds
from ..storage.folder import locked
from ..storage.model_files import PROCESSOR_NAME
from ..streams import Split, StreamedImages, Task, TaskImages, TaskStream, cache_images, open_images
from ..streams.images import augment
from ..streams.stream import BorderlessStream
from .arguments import ContinualTrainingArguments
from .checkpoints import Checkpoints, Progress
from .console import print_task, waiting
from .costs import bytes_beside_experts, describe_environment, note_costs, timed
from .evaluation import Evaluator, TaskEvaluation
from .experts_from import Donor
from .features import extract_queries
from .fingerprint import describe, note_pictures, same_pictures
from .output import check_output
from .parallel import LocalAccelerator, ParallelExperts, check_independent
from .probe import fit_probe
from .processes import Stop, any_process_stops, cpu_only, explaining_lost_processes, join_processes
from .steps import StepLoop, TrainingStopped, stopping_on_signals


logger = get_logger(__name__)


class ContinualTrainer:
    """Teaches a [`ContinualModel`] tasks one after another through Accelerate, on one process or many.

    Args:
        model ([`ContinualModel`]): New, or loaded with what it has learnt so far. Its report goes on, too.
        args ([`ContinualTrainingArguments`], *optional*): How to train.
        on_step (callable, *optional*): Called after every optimizer step with the number of steps done and that of all
            steps of the task, for a progress bar of your own. What it raises ends the training.

    Raises:
        [`ConfigError`]: The model cannot take the experts of `experts_from`.
        [`HubError`]: The model is to be pushed, and the Hub cannot be reached, refuses, or holds another model.

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
        on_step: Callable[[int, int], None] | None = None,
    ):
        args = self.args = args or ContinualTrainingArguments()
        self.on_step = on_step
        join_processes(args.ddp_timeout)
        self.accelerator = Accelerator(
            cpu=cpu_only(),
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
            # A batch is a total that processes share: results do not depend on how many there are.
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=args.seed
            ),
        )
        if args.report_to != "none":
            self.accelerator.init_trackers(args.run_name, config=args.to_log())
        self.model = model.to(self.accelerator.device)
        self.evaluator = Evaluator(self.model, self.accelerator, args)
        if model.report is None:
            model.report = StreamReport(model.config.method.name, "stream", {})
            model.report.catch_up(model.config.tasks)
        self.report = model.report
        self._measured = self.report.measured()
        self.evaluator.before = self.report.test_forwards_per_image
        self.report.environment = describe_environment(model, self.accelerator, args, self.report.environment)
        if args.license is not None:
            model.config.license = args.license
        self._shows = self.accelerator.is_main_process and not args.disable_tqdm
        self._tests: dict[int, Task] = {}  # tasks that can be tested, by position in the model
        self._seen: list[tuple[Task, TaskImages]] = []  # training images, for methods that train on all tasks at once
        self._step = 0  # optimizer steps so far, as trackers count them
        self._fresh = True  # nothing was learnt by this trainer yet
        self.stop = Stop()  # set from outside to end training where it can go on
        self._checkpoints = Checkpoints(args.output_dir, args.save_total_limit, self.accelerator.process_index)
        self._parallel = ParallelExperts(args.output_dir, model, {**args.decisive(), **self._made_with()})
        self._donor = None if args.experts_from is None else Donor(args.experts_from, model)
        self._outbox = self._open_outbox() if args.push_to_hub and self.accelerator.is_main_process else None
        if self._outbox is not None:
            self._flush(self._outbox)

    def learn_stream(self, stream: TaskStream | BorderlessStream) -> StreamReport:
        """Learns the tasks of a stream in order; evaluates, saves and pushes after each. Goes on where the model is.

        Args:
            stream ([`TaskStream`] or [`BorderlessStream`]): The tasks. Those that the model has learnt already are
                tested again, not learnt; those that it has unlearnt are left out.

        Returns:
            [`StreamReport`]: Of all tasks of the model.

        Raises:
            [`ConfigError`]: The model has learnt a task of this name with other classes, `output_dir` holds another
                model, or another run is writing into it.
            [`TrainingError`]: The loss is not finite, or another process is gone; the model is as it was after the
                task before.
            [`TrainingStopped`]: The process got SIGTERM or SIGINT, and all that is needed to go on is saved.
        """
        if not isinstance(stream, TaskStream) and (self.args.task_parallel or self.model.config.method.joint):
            raise ConfigError(
                "task_parallel and methods that train jointly must know all tasks beforehand; this stream finds them "
                "while its images come."
            )
        self.report.stream, self.report.dataset = stream.name, stream.dataset
        learnt = {known.name: position for position, known in enumerate(self.model.config.tasks)}
        last = stream[-1] if isinstance(stream, TaskStream) else None
        with self._alone(), stopping_on_signals(self.stop), explaining_lost_processes(self.accelerator):
            if self.args.task_parallel and isinstance(stream, TaskStream):
                self._train_in_parallel(stream)
            for task in stream:
                if any_process_stops(self.stop, self.accelerator):
                    raise TrainingStopped(self.stop.signal)
                if task.name in learnt:
                    self._take_up(task, learnt[task.name])
                elif task.name in self.model.config.removed:
                    logger.warning("%s was unlearnt and stays so; learn it under another name.", task.name)
                elif task is not last and self.model.config.method.joint:
                    self._postpone(task)
                else:
                    self._learn(task)
            if self.accelerator.is_main_process:
                self._parallel.clear()
        if self.args.report_to != "none":
            self.accelerator.end_training()
        return self.report

    def learn(self, task: Task) -> StreamReport:
        """Learns one task, evaluates on all tasks whose test images this trainer has seen, saves and pushes the model.

        A method that trains jointly trains on this task and all that this trainer has seen before.

        Args:
            task ([`Task`]): It may be one that nobody knew of when the model was made.

        Returns:
            [`StreamReport`]: Of all tasks of the model.

        Raises:
            [`ConfigError`]: `output_dir` holds another model, or another run is writing into it.
            [`ExpertError`]: Another thread is teaching the model.
            [`TrainingError`]: The loss is not finite, or another process is gone; the model is as it was.
        """
        with self._alone(), explaining_lost_processes(self.accelerator):
            return self._learn(task)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other runs out of the folder, and its checkpoints out of this run, if it is a new one."""
        main = self.accelerator.is_main_process
        with locked(self.args.output_dir) if main else nullcontext():
            if main:
                check_output(self.args, self.model.config, new_run=self._fresh)
            if main and self.args.resume_from_checkpoint is None:
                self._checkpoints.clear()
                self._parallel.clear()
            self._fresh = False
            self.accelerator.wait_for_everyone()
            with self.model.bank.learning():
                yield

    def _learn(self, task: Task) -> StreamReport:
        args, method = self.args, self.model.config.method
        seconds: dict[str, float] = {}
        owner = len(self.model.config.tasks)
        with timed(seconds, "images"):
            train = self._training_images(task.train)
            test = None if task.test is None else self._images(task.test)
        with timed(seconds, "forward_transfer"):
            before = self._evaluate_before(task, test)
        set_seed(args.seed + owner)
        learner = self.model.start_task(task.name, task.classes, task.domain)
        images, stored = self._join(task, train), bytes_beside_experts(self.model)
        trained_on = describe(task, owner, images)
        self._fit(learner, images, seconds, trained_on)
        with self.model.bank.lock.writing():  # no other thread sees, or saves, a task without its prototypes
            self.model.finish_task(learner, len(train))
            if method.routed:
                with timed(seconds, "router"):
                    self._teach_router(task, train)
            elif method.experts == "single":
                self.evaluator.expert_changed()
            note_costs(self.report, self.model, learner, len(images), self.args, seconds, stored)
        with timed(seconds, "evaluate"):
            if test is not None:
                self._tests[owner] = task
                self.evaluator.add(task.name, test)
            self._evaluate(before)
        note_pictures(self.report.environment, task.name, trained_on, test)
        if self._shows:
            print_task(self.report)
        self._save()
        self.accelerator.free_memory()
        return self.report

    def _take_up(self, task: Task, position: int) -> None:
        """Makes a task that was learnt before part of the evaluations to come."""
        known = self.model.config.tasks[position]
        if (list(task.classes), task.domain) != (known.classes, known.domain):
            raise ConfigError(
                f"The model has learnt {known.name} with the classes {known.classes} (domain {known.domain}); in this "
                f"stream it has {list(task.classes)} (domain {task.domain}). Go on with the same stream."
            )
        if self.model.config.method.joint:
            images = self._training_images(task.train)
            assert isinstance(images, TaskImages)
            self._seen.append((task, images))
        if task.test is not None:
            test = self._images(task.test)
            self._tests[position] = task
            same = same_pictures(self.report.environment, task.name, test)
            self.evaluator.add(task.name, test, position if same and position in self._measured else None)

    def _train_in_parallel(self, stream: TaskStream) -> None:
        """Trains the experts of all tasks to come, every process its own ones; they are taken up in order later."""
        check_independent(self.model.config.method, stream, self.accelerator.mixed_precision)
        local, rank, args = LocalAccelerator(self.accelerator), self.accelerator.process_index, self.args
        checkpoints = Checkpoints(self._parallel.folder / f".rank-{rank}", args.save_total_limit)
        for position, task in self._parallel.todo(stream, rank, self.accelerator.num_processes):
            if self.stop.is_set():
                raise TrainingStopped(self.stop.signal)
            seconds: dict[str, float] = {}
            images = self._open(task.train)
            trained_on = describe(task, position, images)
            if self._parallel.has(task.name, trained_on):
                continue
            set_seed(args.seed + position)
            learner = self.model.start_task(task.name, task.classes, task.domain)
            with timed(seconds, "train"):
                self._train(learner, images, None, local, checkpoints, trained_on)
            assert isinstance(learner, ExpertLearner)
            self._parallel.put(learner, seconds["train"], trained_on)
        self.model.bank.abandon()
        self.accelerator.wait_for_everyone()

    def _postpone(self, task: Task) -> None:
        """Makes a task known whose images are trained on later, together with those of others."""
        train, position = self._training_images(task.train), len(self.model.config.tasks)
        stored = bytes_beside_experts(self.model)
        learner = self.model.start_task(task.name, task.classes, task.domain)
        with self.model.bank.lock.writing():
            self.model.finish_task(learner, len(train))
            note_costs(self.report, self.model, learner, len(train), self.args, {}, stored)
        self._take_up(task, position)

    def _join(self, task: Task, train: TaskImages | StreamedImages) -> TaskImages | StreamedImages:
        """What to train on: the task's images, or, jointly, those of all tasks, labelled by the model's classes."""
        if not self.model.config.method.joint:
            return train
        assert isinstance(train, TaskImages)
        self._seen.append((task, train))
        classes = list(dict.fromkeys([*self.model.config.classes, *task.classes]))
        numbers = [np.array([classes.index(label) for label in seen.classes]) for seen, _ in self._seen]
        return TaskImages.joined([images for _, images in self._seen], numbers)

    def _images(self, split: Split) -> TaskImages:
        """Resized images of a split; the main process writes the Arrow file, the others find it."""
        with self.accelerator.main_process_first():
            return cache_images(split, self.model.backbone.transform, self.args.max_bad_images)

    def _training_images(self, split: Split) -> TaskImages | StreamedImages:
        with self.accelerator.main_process_first():
            images = self._open(split)
        if isinstance(images, StreamedImages) and self.model.config.method.joint:
            raise ConfigError(
                f"{split.title}: {len(images)} images do not fit into cache_size_gb={self.args.cache_size_gb}, and "
                f"{self.model.config.method.name}, which trains on all tasks at once, needs them on disk."
            )
        return images

    def _open(self, split: Split) -> TaskImages | StreamedImages:
        args = self.args
        return open_images(split, self.model.backbone.transform, args.max_bad_images, args.cache_size_gb, args.seed)

    def _fit(
        self,
        learner: TaskLearner,
        images: TaskImages | StreamedImages,
        seconds: dict[str, float],
        trained_on: dict,
    ) -> None:
        """Fills the learner: by training, from a model that has learnt the task, or, for a probe, at once."""
        method, queries, name = self.model.config.method, None, learner.config.name
        if self._parallel.give(learner, seconds, trained_on):
            return
        if self._donor is not None and self._donor.give(learner, seconds):
            return
        probe = isinstance(learner, FrozenLearner) and method.classifier == "head"
        cached = method.experts == "pool" and self.args.cache_query_features
        if isinstance(images, TaskImages) and (probe or cached):  # a probe trains jointly, so never on a stream
            with timed(seconds, "queries"):
                queries = extract_queries(images, self.model, self.accelerator, self.args, desc=f"Querying {name}")
        if probe:
            assert isinstance(images, TaskImages) and queries is not None
            with timed(seconds, "probe"), waiting(f"Fitting the head of {name}", self._shows):
                fit_probe(learner.head, queries, learner.targets.cpu()[torch.from_numpy(images.labels)])
        elif not isinstance(learner, FrozenLearner):
            with timed(seconds, "train"):
                self._train(learner, images, queries, self.accelerator, self._checkpoints, trained_on)

    def _teach_router(self, task: Task, images: TaskImages | StreamedImages) -> None:
        """Adds the query features of all training images to the router, or of a sample where they are not on disk."""
        images = images.sample if isinstance(images, StreamedImages) else images
        query = extract_queries(images, self.model, self.accelerator, self.args, desc=f"Querying {task.name}")
        router, classes = self.model.router, self.model.config.classes
        with waiting(f"Teaching the router {task.name}", self._shows):
            if router.knows_classes:
                numbers = torch.tensor([classes.index(label) for label in task.classes])
                router.add(query, numbers[torch.from_numpy(images.labels)])
            else:
                router.add_prototypes(*self._fit_prototypes(query, task.name))

    def _fit_prototypes(self, query: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Prototypes and thresholds, on one process for all."""
        k = self.model.config.method.k
        if isinstance(k, int) and k > len(query):
            logger.warning("%s has %d images, fewer than k=%d prototypes: using %d.", name, len(query), k, len(query))
        fitted: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            prototypes = fit_prototypes(query, k, seed=self.args.seed)
            fitted = [prototypes, fit_thresholds(query, len(prototypes), seed=self.args.seed)]
        return tuple(broadcast_object_list(fitted))

    def _train(
        self,
        learner: TaskLearner,
        images: TaskImages | StreamedImages,
        queries: torch.Tensor | None,
        accelerator: Accelerator | LocalAccelerator,
        checkpoints: Checkpoints,
        trained_on: dict,
    ) -> None:
        """Trains the experts and the head rows of one task; query features are computed in every step if not given."""
        if len(learner.classes) == 1:
            return  # nothing to be told from: the loss is zero, whatever the weights are
        args, transform = self.args, self.model.backbone.transform
        made_with = {**self._made_with(), **trained_on, "model": self._state()}
        loop = StepLoop(learner, images, accelerator, args, checkpoints, made_with, self._step)
        bar = tqdm(
            total=loop.num_steps,
            desc=f"Training {learner.config.name} ({learner.config.title})",
            disable=not self._shows,
            leave=False,
        )

        def loss_of(module: torch.nn.Module, batch: dict) -> torch.Tensor:
            pixel_values = augment(transform.normalize(batch["pixels"]), batch.get("view"))
            with accelerator.autocast():
                query = self._query(pixel_values, batch, queries)
                return module(pixel_values, batch["label"], query, batch["weight"])[0]

        def after_step(progress: Progress, loss: torch.Tensor) -> None:
            bar.update(progress.step - bar.n)
            if self.on_step is not None:
                self.on_step(progress.step, loop.num_steps)
            self._step = progress.logged
            if self._step % args.logging_steps == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                self.accelerator.log({"train/loss": loss.item()}, step=self._step)

        loop.run(loss_of, after_step, self.stop)
        bar.close()

    def _made_with(self) -> dict:
        """What a checkpoint inside a task depends on besides the arguments."""
        config = self.model.config
        return {
            "method": {name: value for name, value in vars(config.method).items() if name != "head"},
            "backbone": [config.backbone.weight_hash, config.backbone.image_size],
        }

    def _state(self) -> str:
        """What the model was when it was last saved or loaded: a task that shares what it trains begins there."""
        files = {path: digest for path, digest in self.model.config.files.items() if path != PROCESSOR_NAME}
        return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()

    def _query(self, pixel_values: torch.Tensor, batch: dict, queries: torch.Tensor | None) -> torch.Tensor | None:
        """Query features of a training batch, for methods whose loss needs them."""
        if self.model.config.method.experts != "pool":
            return None
        if queries is not None:
            return queries[batch["index"].cpu()].to(pixel_values.device)
        with torch.no_grad(), self.accelerator.autocast():
            return self.model.query_features(pixel_values)

    def _evaluate_before(self, task: Task, test: TaskImages | None) -> float | None:
        """`A[i-1, i]`, for forward transfer, where the model knows the task's classes already."""
        known = set(task.classes) <= set(self.model.config.classes)
        if not self.args.forward_transfer or test is None or not known:
            return None
        self.evaluator.add(task.name, test)
        return self.evaluator.evaluate(task.name, task.classes, owner=None).accuracy

    def _evaluate(self, before: float | None) -> None:
        """Fills the last row of the accuracy matrix."""
        results = {
            position: self.evaluator.evaluate(task.name, task.classes, position)
            for position, task in sorted(self._tests.items())
        }
        with self.model.bank.lock.writing():  # no other thread saves half of it
            self._note(results, before)
        self.accelerator.log({f"eval/{name}": value for name, value in self.report.summary().items()}, step=self._step)

    def _note(self, results: dict[int, TaskEvaluation], before: float | None) -> None:
        """Puts what was measured into the report."""
        report, model, count = self.report, self.model, len(self.model.config.tasks)
        if before is not None and count > 1:
            report.accuracy_matrix[-2][-1] = before
        for position, result in results.items():
            report.accuracy_matrix[-1][position] = result.accuracy
        if model.config.method.experts in ("per_task", "pool"):
            report.experts = model.bank.names if model.config.method.experts == "pool" else list(report.titles)
            confusion = np.zeros((count, len(report.experts)), dtype=int)
            for position, result in results.items():
                confusion[position] = result.routed
            report.routing_confusion = confusion.tolist()
        if model.config.method.experts == "per_task":
            report.oracle_accuracy = [
                results[position].oracle_accuracy if position in results else math.nan for position in range(count)
            ]
        report.test_forwards_per_image = self.evaluator.forwards_per_image()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            try:
                self.model.save_pretrained(self.args.output_dir, overwrite=self.args.overwrite_output_dir)
            except OSError as error:
                hint = "Mend that, and go on after the last saved task with --resume_from_checkpoint auto."
                raise OSError(error.errno, f"{error.strerror}. {hint}") from error
            self._checkpoints.clear()
            self._push()
        self.accelerator.wait_for_everyone()

    def _open_outbox(self) -> Outbox:
        """Checks before any work is done that the model can be pushed, and pushes what a killed run could not."""
        args = self.args
        assert args.push_repo is not None
        target = PushTarget(args.push_repo, args.hub_token, args.hub_private_repo, args.hub_revision)
        return Outbox.open(args.output_dir, target, self.model.config)

    def _push(self) -> None:
        if self._outbox is not None:
            self._outbox.put()
            self._flush(self._outbox)

    def _flush(self, outbox: Outbox) -> None:
        try:
            outbox.flush()
        except HubError as error:
            logger.warning(
                "%s Learning goes on. %d tasks wait in %s; they go with the next task, or with: hf-clpeft push %s",
                error,
                len(outbox.pending()),
                outbox.folder,
                shlex.quote(self.args.output_dir),
            )
