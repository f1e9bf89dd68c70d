"""Training arguments: everything but the method and the stream."""

import os
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from ..backbones.views import MOST as MOST_VIEWS
from ..config.checks import MOST, check_ranges, check_types
from ..config.errors import ConfigError


COUNTS = (
    "num_train_epochs",
    "train_batch_size",
    "eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "ddp_timeout",
    "logging_steps",
    "together",
)
FROM_ZERO = (
    "learning_rate",
    "head_learning_rate",
    "weight_decay",
    "max_grad_norm",
    "max_bad_images",
    "save_steps",
    "seed",
    "dataloader_num_workers",
    "trunk_cache_gb",
    "num_examples",
)
WORKERS = 2  # processes that read resized images for a GPU, by default
ENOUGH_BATCHES = 16  # fewer are read before workers have started
ENOUGH_MEMORY = 2**30  # bytes; containers often have less, and then a worker crashes

# May differ between a run and its resumption.
MAY_CHANGE = {
    "dataloader_num_workers",
    "ddp_timeout",
    "disable_tqdm",
    "eval_batch_size",
    "experts_from",
    "forward_transfer",
    "gradient_checkpointing",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_token",
    "license",
    "logging_steps",
    "num_examples",
    "num_thumbnails",
    "output_dir",
    "overwrite_output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_total_limit",
    "task_parallel",
    "together",
    "torch_compile",
    "trunk_cache_gb",
}


@dataclass
class ContinualTrainingArguments:
    """How to train each task. Field names are those of `transformers.TrainingArguments` where it has them.

    Batch sizes are totals: every batch is sharded by row over the processes, so results do not depend on their number,
    up to the order of floating-point sums: in tests, weights of experts differed by 2e-5 at most, and no accuracy did.
    Dropout in an adapter is sampled by each process on its own.

    Raises:
        [`ConfigError`]: A value is out of range.

    Example:

    ```py
    >>> from hf_clpeft import ContinualTrainingArguments

    >>> ContinualTrainingArguments(output_dir="out", num_train_epochs=5).optim
    'adamw'

    ```
    """

    output_dir: str = field(default="out", metadata={"help": "Folder for the model, its metrics and plots."})
    num_train_epochs: int = field(default=5, metadata={"help": "Passes over the training images of each task."})
    train_batch_size: int = field(default=128, metadata={"help": "Images per batch, over all processes."})
    eval_batch_size: int = field(
        default=128, metadata={"help": "Images per batch of evaluation and query features, over all processes."}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the adapter."})
    head_learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of the head."})
    optim: Literal["adamw", "sgd"] = field(
        default="adamw", metadata={"help": "AdamW, fused on a CUDA GPU; or SGD with momentum 0.9."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the adapter and the head."})
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = field(default="cosine", metadata={"help": "Scheduler of transformers; restarts with every task."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Fraction of a task's steps with linear warmup."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm for clipping; 0 disables it."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None,
        metadata={
            "help": "Mixed precision; default: that of `accelerate launch`, else bf16 on a CUDA GPU that has it. "
            "There, float32 is TF32 in the backbone, but never in routers and heads."
        },
    )
    torch_compile: bool = field(
        default=False,
        metadata={"help": "Compile the backbone and its experts with torch.compile, for training and evaluation."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Save memory in training: compute the activations inside the layers of the backbone again in the "
            "backward pass, which takes a third more time."
        },
    )
    augmentation: Literal["none", "flip", "crop", "crop_flip"] = field(
        default="none",
        metadata={"help": "Augmentation of training images, on the device; mirror images are wrong for text."},
    )
    augmentation_views: int = field(
        default=0,
        metadata={
            "help": "Fixed views of each image that epochs take in turn: the image, its mirror image if augmentation "
            "has these, random crops. With expert_layers, the layers below run once per view, within "
            "trunk_cache_gb. Default: new views in every step."
        },
    )
    cache_query_features: bool = field(
        default=True,
        metadata={
            "help": "Compute query features once per task from unaugmented images, instead of in every step from "
            "augmented ones; for methods whose loss needs them (L2P, L2L)."
        },
    )
    max_bad_images: int = field(
        default=0,
        metadata={
            "help": "Skip at most this many images of a split that cannot be decoded; `hf-clpeft learn`: one in ten."
        },
    )
    cache_size_gb: float | None = field(
        default=None,
        metadata={
            "help": "Cache the resized training images of a task on disk if they take at most this many GB; else "
            "decode them again in every epoch. Default: no limit."
        },
    )
    trunk_cache_gb: float = field(
        default=10.0,
        metadata={
            "help": "With expert_layers, keep the outputs of the layers below on disk, up to this many GB a process, "
            "so that these run once per image; 0 runs them in every epoch."
        },
    )
    forward_transfer: bool = field(
        default=False, metadata={"help": "Also evaluate each task before it is learnt, if its classes are known."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Resume after the last learnt task of a model: its folder or repo id, or auto for the one in "
            "output_dir, else the one in the repo to push to, else a new model."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Replace another model in output_dir once the first task is saved, instead of raising an error "
            "before training."
        },
    )
    task_parallel: bool = field(
        default=False,
        metadata={"help": "Train one task per process at a time; for methods with an expert per task."},
    )
    together: int = field(
        default=1,
        metadata={
            "help": "Train the experts of so many tasks at once in mixed batches, on each process; for methods with "
            "an expert per task, where the batches of one do not fill the device."
        },
    )
    ddp_timeout: int = field(
        default=1800, metadata={"help": "Seconds before the run ends because a process does not respond."}
    )
    save_steps: int = field(
        default=500,
        metadata={"help": "Optimizer steps between checkpoints inside a task; 0 saves one on SIGTERM or SIGINT only."},
    )
    save_total_limit: int = field(default=2, metadata={"help": "Number of these checkpoints to keep."})
    experts_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder or repo of a model that has learnt the same tasks: copy its experts and head rows instead "
            "of training them, to try another router or classifier."
        },
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push the model after every task, as a commit tagged with its name."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repo to push to; default: the name of output_dir."}
    )
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Access token; default: that of `hf auth login`. Never stored."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repo is private; default: its owner's setting."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to; default: main."})
    license: str | None = field(
        default=None, metadata={"help": "License identifier of the Hub for the experts; default: apache-2.0."}
    )
    num_examples: int = field(
        default=8,
        metadata={
            "help": "Test pictures, of all tasks together, that are saved and pushed with the model for people to try "
            "it with; 0 for pictures that others must not see. With hub_private_repo there are none."
        },
    )
    num_thumbnails: int = field(
        default=0,
        metadata={
            "help": "Small training pictures of every task, at most 32, that are saved and pushed with the model, to "
            "show why an image was routed to it."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialisation, shuffling and k-means."})
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = field(
        default="none", metadata={"help": "Experiment tracker."}
    )
    run_name: str = field(default="hf_clpeft", metadata={"help": "Project name in the tracker."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between logged losses."})
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Worker processes that prefetch cached images; 0 reads them in the main one. Default: 2 for a "
            "CUDA GPU, if there are batches enough, else 0."
        },
    )
    disable_tqdm: bool = field(
        default=False, metadata={"help": "Disable progress bars and the table after each task."}
    )

    def __post_init__(self) -> None:
        self.output_dir = os.fspath(self.output_dir)
        check_types(self)
        check_ranges(self, **dict.fromkeys(COUNTS, (1, MOST)), **dict.fromkeys(FROM_ZERO, (0, MOST)))
        check_ranges(self, warmup_ratio=(0, 1), num_thumbnails=(0, 32))
        if not self.output_dir:
            raise ConfigError("output_dir is empty; pass a folder, or . for the current one.")
        if self.cache_size_gb is not None and not 0 < self.cache_size_gb <= MOST:
            raise ConfigError(f"cache_size_gb={self.cache_size_gb} must be more than 0.")
        most = MOST_VIEWS[self.augmentation] if self.augmentation != "none" else 0
        if not 0 <= self.augmentation_views <= most:
            raise ConfigError(
                f"augmentation_views={self.augmentation_views} must be from 0 to {most} with "
                f"augmentation={self.augmentation}."
            )
        if self.gradient_checkpointing and self.torch_compile:
            raise ConfigError(
                "torch_compile cannot compile layers that gradient_checkpointing runs twice; leave out one of them."
            )
        if self.together > 1 and self.torch_compile:
            raise ConfigError(
                f"torch_compile cannot compile experts that are trained together; leave out together={self.together}, "
                "or torch_compile."
            )
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise ConfigError(f"report_to={self.report_to!r} is not installed; run `pip install {self.report_to}`.")

    @property
    def push_repo(self) -> str | None:
        """Repo to push to, if any."""
        return (self.hub_model_id or Path(self.output_dir).absolute().name) if self.push_to_hub else None

    def num_steps(self, num_batches: int) -> int:
        """Optimizer steps of a task whose images make so many batches in an epoch."""
        return self.num_train_epochs * -(-num_batches // self.gradient_accumulation_steps)

    def loading(self, num_batches: int, device: torch.device) -> dict[str, Any]:
        """Options of [`TaskImages.loader`] for so many batches that go to a device.

        Example:

        ```py
        >>> import torch
        >>> from hf_clpeft import ContinualTrainingArguments

        >>> ContinualTrainingArguments().loading(num_batches=1_000, device=torch.device("cpu"))
        {'num_workers': 0, 'pin_memory': False}

        ```
        """
        gpu, workers = device.type == "cuda", self.dataloader_num_workers
        if workers is None:
            worth = num_batches >= ENOUGH_BATCHES and shared_memory() >= ENOUGH_MEMORY
            workers = min(WORKERS, os.cpu_count() or 1) if gpu and worth else 0
        return {"num_workers": workers, "pin_memory": gpu}

    def decisive(self) -> dict:
        """The arguments that determine the result of training."""
        return {name: value for name, value in vars(self).items() if name not in MAY_CHANGE}

    def to_log(self) -> dict:
        """The arguments for logs and trackers, without the token and empty values."""
        return {name: value for name, value in vars(self).items() if name != "hub_token" and value is not None}


def shared_memory() -> int:
    """Bytes that are free to hand batches from worker processes to the main one.

    Example:

    ```py
    >>> from hf_clpeft.training.arguments import shared_memory

    >>> shared_memory() >= 0
    True

    ```
    """
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
