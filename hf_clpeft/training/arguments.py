"""How to train: everything that is neither the method nor the stream."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

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
)

# What may differ between a run and the one that goes on with it.
MAY_CHANGE = {
    "dataloader_num_workers",
    "ddp_timeout",
    "disable_tqdm",
    "eval_batch_size",
    "experts_from",
    "forward_transfer",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_token",
    "license",
    "logging_steps",
    "output_dir",
    "overwrite_output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_total_limit",
    "task_parallel",
}


@dataclass
class ContinualTrainingArguments:
    """How to train each task. Field names are those of `transformers.TrainingArguments` where it has them.

    Batch sizes are totals: N processes share every batch row by row, so that a run does not depend on how many there
    are, but for the order in which floats are added up: in tests, the weights of experts differed by 2e-5 at most, and
    no accuracy. Dropout in an adapter is drawn by each process for itself.

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
    train_batch_size: int = field(
        default=128, metadata={"help": "Images per optimizer step and accumulation step, over all processes."}
    )
    eval_batch_size: int = field(
        default=128, metadata={"help": "Images per forward pass without training, over all processes."}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the expert."})
    head_learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of the head."})
    optim: Literal["adamw", "sgd"] = field(default="adamw", metadata={"help": "AdamW, or SGD with momentum 0.9."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the expert and the head."})
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = field(default="cosine", metadata={"help": "Name of a transformers scheduler; restarts with every task."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of a task's steps with rising learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip gradients to this norm; 0 does not clip."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Precision of forward passes; default: as `accelerate launch` says."}
    )
    augmentation: Literal["none", "flip", "crop_flip"] = field(
        default="none", metadata={"help": "Random views of training images, made on the device."}
    )
    cache_query_features: bool = field(
        default=True,
        metadata={
            "help": "Compute query features of training images once per task, of the images as they are, rather than "
            "in every step from augmented ones; where the loss needs them (L2P, L2L)."
        },
    )
    max_bad_images: int = field(
        default=0, metadata={"help": "Leave out at most so many images of a split that cannot be decoded."}
    )
    cache_size_gb: float | None = field(
        default=None,
        metadata={
            "help": "Keep the resized training images of a task on disk only if they take at most so many GB; others "
            "are read and decoded anew in every epoch. Default: no limit."
        },
    )
    forward_transfer: bool = field(
        default=False,
        metadata={"help": "Also evaluate each task just before it is learnt, if its classes are known by then."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on after the last task that a model has learnt: the model's folder or repo id, or auto for "
            "the one in output_dir, else the one in the repo that is pushed to, else none."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Let a new model take the place of another one in output_dir, once its first task is saved. "
            "Otherwise that is refused before anything is done."
        },
    )
    task_parallel: bool = field(
        default=False,
        metadata={"help": "Where every task has its own expert: train as many at a time as there are processes."},
    )
    ddp_timeout: int = field(
        default=1800,
        metadata={"help": "Seconds that processes wait for one that does not answer before the run ends."},
    )
    save_steps: int = field(
        default=500,
        metadata={
            "help": "Save the state inside a task every so many optimizer steps, to go on there; 0: only when the "
            "process is asked to stop (SIGTERM, SIGINT)."
        },
    )
    save_total_limit: int = field(default=2, metadata={"help": "How many of these states to keep."})
    experts_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder or repo of a model that has learnt the same tasks: take over its experts and head rows in "
            "place of training them, to try another router or another way to classify."
        },
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push the model after every task: one commit, and one tag named after it."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repo to push to; default: one named after output_dir."}
    )
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token to push with; default: as logged in. It is stored nowhere."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repo is private; default: as its owner has set."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to; default: main."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the experts as the Hub spells it; default: apache-2.0."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialisation, order of images, and k-means."})
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = field(
        default="none", metadata={"help": "Tracker."}
    )
    run_name: str = field(default="hf_clpeft", metadata={"help": "Name of the tracker's project."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between two logged losses."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read resized images ahead; 0 reads them in the training process."}
    )
    disable_tqdm: bool = field(
        default=False, metadata={"help": "Show no progress bars, and no table after each task."}
    )

    def __post_init__(self) -> None:
        self.output_dir = os.fspath(self.output_dir)
        check_types(self)
        check_ranges(self, **dict.fromkeys(COUNTS, (1, MOST)), **dict.fromkeys(FROM_ZERO, (0, MOST)))
        check_ranges(self, warmup_ratio=(0, 1))
        if not self.output_dir:
            raise ConfigError("output_dir is empty; name a folder, or . for the one you are in.")
        if self.cache_size_gb is not None and not 0 < self.cache_size_gb <= MOST:
            raise ConfigError(f"cache_size_gb={self.cache_size_gb} must be more than 0.")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise ConfigError(f"report_to={self.report_to!r} is not installed; run `pip install {self.report_to}`.")

    @property
    def push_repo(self) -> str | None:
        """Repo to push to, if any."""
        return (self.hub_model_id or Path(self.output_dir).absolute().name) if self.push_to_hub else None

    def decisive(self) -> dict:
        """The arguments that decide what training gives."""
        return {name: value for name, value in vars(self).items() if name not in MAY_CHANGE}

    def to_log(self) -> dict:
        """What may be shown to everybody: all but the token, empty values left out."""
        return {name: value for name, value in vars(self).items() if name != "hub_token" and value is not None}
