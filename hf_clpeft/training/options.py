"""The options of a recipe's command line that are neither the method's nor the trainer's, and how they are read."""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from ..backbones.bundled import BUNDLED_BACKBONES
from ..config.checks import MOST, check_ranges, check_types
from ..config.errors import ConfigError, OptionError
from ..streams import BENCHMARKS, TaskStream, load_benchmark


@dataclass
class StreamArguments:
    """Which tasks to learn: a named benchmark, or a data set split by class or by domain."""

    benchmark: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(BENCHMARKS)}. Default: split_cifar100, unless --dataset is given."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder (Parquet or ImageFolder); with --benchmark, replaces its data set."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit of the data set's repo."})
    streaming: bool = field(default=False, metadata={"help": "Stream rows instead of downloading the data set first."})
    scenario: Literal["class", "domain"] = field(
        default="class", metadata={"help": "With --dataset: split into tasks by class or by domain."}
    )
    num_tasks: int | None = field(default=None, metadata={"help": "Number of tasks (scenario class only)."})
    class_order_seed: int | None = field(
        default=None, metadata={"help": "Seed that shuffles the class order (scenario class only)."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Split to train on. Default: train."})
    test_split: str | None = field(default=None, metadata={"help": "Split to test on. Default: detected."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images. Default: detected."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels. Default: detected."})
    domain_column: str | None = field(default=None, metadata={"help": "Column of domains (scenario domain only)."})
    max_train_samples_per_task: int | None = field(default=None, metadata={"help": "Maximum images per task."})
    max_test_samples_per_task: int | None = field(default=None, metadata={"help": "Maximum images per task."})

    def __post_init__(self) -> None:
        check_types(self)
        limits = ("num_tasks", "max_train_samples_per_task", "max_test_samples_per_task")
        check_ranges(self, **dict.fromkeys(limits, (1, MOST)), class_order_seed=(0, MOST))
        known = BENCHMARKS.get(self.benchmark or "")
        scenario = self.scenario if known is None else known.scenario
        foreign = ("num_tasks", "class_order_seed") if scenario == "domain" else ("domain_column",)
        for name in foreign:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} does not apply when tasks are split by "
                    f"{'domain' if scenario == 'domain' else 'class'}; leave it out."
                )

    def load(self) -> TaskStream:
        """Loads the stream."""
        options: dict[str, Any] = {
            "name": self.dataset_name,
            "revision": self.dataset_revision,
            "num_tasks": self.num_tasks,
            "seed": self.class_order_seed,
        }
        for name in ("train_split", "test_split", "image_column", "label_column", "domain_column", "streaming"):
            options[name] = getattr(self, name)
        for name in ("max_train_samples_per_task", "max_test_samples_per_task"):
            options[name] = getattr(self, name)
        options = {name: value for name, value in options.items() if value not in (None, False)}
        if self.benchmark is not None:
            return load_benchmark(self.benchmark, dataset=self.dataset, **options)
        if self.scenario == "class":
            return TaskStream.class_incremental(self.dataset, **options)
        return TaskStream.domain_incremental(self.dataset, **options)


@dataclass
class BackboneArguments:
    """Which frozen backbone to use."""

    backbone: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={"help": f"Repo id or folder; {', '.join(BUNDLED_BACKBONES)} is bundled with the package."},
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Commit of the backbone's repo."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the input in pixels. Default: the checkpoint's."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype of the frozen weights."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation, as in transformers: sdpa, eager, flash_attention_2, ... Training in "
            "bfloat16 on a CPU is much faster with eager."
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, image_size=(1, 16_384))


@dataclass
class RunArguments:
    """How to run the recipe."""

    dry_run: bool = field(
        default=False, metadata={"help": "Print the plan (tasks, classes, parameters, steps) and stop."}
    )


@dataclass
class PrototypeArguments:
    """How S-X methods route and classify."""

    k: str = field(default="5", metadata={"help": "Prototypes per task, or auto: chosen on held-out features."})
    router: Literal["prototypes", "gaussian", "class_means", "ridge"] = field(
        default="prototypes",
        metadata={"help": "What chooses experts: prototypes, as in the paper, or the owner of the likeliest class."},
    )
    head: str = field(
        default="auto",
        metadata={"help": "shared, per_task, or auto: shared where tasks bring new classes and prototypes route."},
    )
    route_layer: list[int] | None = field(
        default=None,
        metadata={"help": "Take query features behind this layer, or these side by side; default: behind the last."},
    )


@dataclass
class PoolArguments:
    """How L2X methods route and train their pool."""

    pool_size: int = field(default=10, metadata={"help": "Experts in the pool."})
    top_n: int = field(default=5, metadata={"help": "Experts that an image selects."})
    pull: float = field(default=0.5, metadata={"help": "Weight of the loss that pulls selected keys towards queries."})
    route_layer: list[int] | None = field(
        default=None,
        metadata={"help": "Take query features behind this layer, or these side by side; default: behind the last."},
    )


def parse(
    groups: tuple[type, ...],
    argv: list[str] | None = None,
    default_benchmark: str = "split_cifar100",
    method: str | None = None,
) -> tuple:
    """Parses a command line into dataclasses.

    Args:
        groups (tuple of dataclasses): Every field an option; [`StreamArguments`] among them.
        argv (`list[str]`, *optional*): Default `sys.argv[1:]`.
        default_benchmark (`str`, *optional*): The stream where neither `--benchmark` nor `--dataset` is given.
        method (`str`, *optional*): Name of the method, for what suits it on the benchmark.

    Returns:
        One instance of each dataclass.

    Raises:
        [`OptionError`]: An option or the benchmark does not exist, a value is none of the option's, or the YAML file
            cannot be read.

    Example:

    ```py
    >>> from hf_clpeft.training.options import BackboneArguments, StreamArguments, parse

    >>> stream, backbone = parse((StreamArguments, BackboneArguments), ["--benchmark", "digits"])
    >>> backbone.backbone
    'hf-clpeft/vit-tiny-glyphs'

    ```
    """
    from .parsing import OptionParser, nearest

    argv = sys.argv[1:] if argv is None else argv
    parser = OptionParser(groups)
    parser.add_argument("--config", help="YAML file of options; the command line wins over it.")
    path = parser.given(argv).config
    words = [*(parser.words_of(path) if path else []), *argv]
    given = parser.given(words)
    benchmark = given.benchmark
    if benchmark is None and not given.dataset:
        benchmark = default_benchmark
    if benchmark is not None and benchmark not in BENCHMARKS:
        near = nearest(benchmark, BENCHMARKS)
        raise OptionError(f"benchmark: there is no {benchmark!r}{near} There are {', '.join(BENCHMARKS)}.")
    suited = BENCHMARKS[benchmark].options_for(method) if benchmark is not None else {}
    suited = {name: value for name, value in suited.items() if name in parser.names}
    parser.set_defaults(**{"benchmark": benchmark, **suited, **parser.emptied})
    *parsed, _ = parser.read(words)
    return tuple(parsed)
