"""Command-line options of recipes for stream, backbone and run, and their parsing."""

import sys
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal

from ..backbones.bundled import BUNDLED_BACKBONES
from ..backbones.quantization import make_quantization
from ..config import MethodOptions
from ..config.checks import MOST, check_ranges, check_types
from ..config.errors import ConfigError, OptionError
from ..methods import METHODS
from ..streams import BENCHMARKS, TaskStream, load_benchmark
from .parsing import OptionParser, nearest, read_yaml


@dataclass
class DataArguments:
    """How to read a data set: splits, columns, limits."""

    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit of the data set's repo."})
    streaming: bool = field(default=False, metadata={"help": "Stream rows instead of downloading the data set first."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on. Default: train."})
    test_split: str | None = field(default=None, metadata={"help": "Split to test on. Default: detected."})
    test_size: float | None = field(
        default=None,
        metadata={
            "help": "Share of every class to hold out for testing if there is no test split; 0: none. Default: 0.2."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images. Default: detected."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels. Default: detected."})
    max_train_samples_per_task: int | None = field(default=None, metadata={"help": "Maximum images per task."})
    max_test_samples_per_task: int | None = field(default=None, metadata={"help": "Maximum images per task."})

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, max_train_samples_per_task=(1, MOST), max_test_samples_per_task=(1, MOST), test_size=(0, 1))

    def reading(self) -> dict[str, Any]:
        """The choices made, as arguments of [`TaskStream.class_incremental`] and [`load_task`]."""
        chosen = {name: value for name, value in vars(self).items() if name in READING}
        names = {"dataset_name": "name", "dataset_revision": "revision"}
        return {names.get(n, n): value for n, value in chosen.items() if value is not None and value is not False}


READING = {f.name for f in fields(DataArguments)}


@dataclass
class StreamArguments(DataArguments):
    """Which tasks to learn: a named benchmark, or a data set split by class or by domain."""

    benchmark: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(BENCHMARKS)}. Default: split_cifar100, unless --dataset is given."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder (Parquet or ImageFolder); with --benchmark, replaces its data set."},
    )
    scenario: Literal["class", "domain"] = field(
        default="class", metadata={"help": "With --dataset: split into tasks by class or by domain."}
    )
    num_tasks: int | None = field(default=None, metadata={"help": "Number of tasks (scenario class only)."})
    class_order_seed: int | None = field(
        default=None, metadata={"help": "Seed that shuffles the class order (scenario class only)."}
    )
    domain_column: str | None = field(default=None, metadata={"help": "Column of domains (scenario domain only)."})
    joined: bool = field(
        default=False,
        metadata={"help": "Learn all tasks as one: joint training, the upper bound of continual methods."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, num_tasks=(1, MOST), class_order_seed=(0, MOST))
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
        options: dict[str, Any] = self.reading()
        own = {"num_tasks": self.num_tasks, "seed": self.class_order_seed, "domain_column": self.domain_column}
        options |= {name: value for name, value in own.items() if value is not None}
        if self.benchmark is not None:
            stream = load_benchmark(self.benchmark, dataset=self.dataset, **options)
        elif self.scenario == "class":
            stream = TaskStream.class_incremental(self.dataset, **options)
        else:
            stream = TaskStream.domain_incremental(self.dataset, **options)
        return stream.joined() if self.joined else stream


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
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Quantise the frozen weights; experts stay in full precision: int8 (torchao), 8bit or 4bit "
            '(bitsandbytes, on a GPU), or a configuration of transformers in JSON: {"quant_method": ...}.'
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, image_size=(1, 16_384))
        if self.quantization is not None:
            make_quantization(self.quantization)  # raises before anything is loaded

    @property
    def loading(self) -> dict[str, Any]:
        """Options of [`load_backbone`] that may differ between a model and its continuation."""
        quantized = {} if self.quantization is None else {"quantization_config": make_quantization(self.quantization)}
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation, **quantized}


@dataclass
class RunArguments:
    """How to run the recipe."""

    dry_run: bool = field(
        default=False, metadata={"help": "Print the plan (tasks, classes, parameters, steps) and stop."}
    )


def options_of(method: str) -> type[MethodOptions]:
    """The options dataclass of a method: its `Config`.

    Raises:
        [`OptionError`]: There is no such method, or the file that defines it has not been imported.

    Example:

    ```py
    >>> from hf_clpeft.training.options import options_of

    >>> options_of("s_lora")(r=4).r
    4

    ```
    """
    if method not in METHODS:
        near = nearest(str(method), METHODS)
        raise OptionError(f"There is no method {method!r}{near} There are {', '.join(METHODS)}.")
    return METHODS[method].Config


def choice_of(methods: tuple[str, ...]) -> type:
    """A dataclass with the option `--method`, whose default is the first of `methods`."""
    help_text = {"help": "The method; its own options are listed below."}
    choice = ("method", Literal[methods], field(default=methods[0], metadata=help_text))
    return make_dataclass("MethodArguments", [choice])


def read_method(methods: tuple[str, ...], argv: list[str]) -> str:
    """The method given on the command line or in its YAML file; default: the first of `methods`.

    It is parsed before all other options, which depend on it.
    """
    parser = OptionParser((choice_of(methods),), add_help=False)
    parser.add_argument("--config")
    parser.set_defaults(method=None)
    given, _ = parser.parse_known_args(argv)
    if given.method is None and given.config is not None:
        said = read_yaml(given.config).get("method")
        given = given if said is None else parser.parse_known_args([f"--method={said}"])[0]
    return given.method or methods[0]


def parse(
    groups: tuple[type, ...],
    argv: list[str] | None = None,
    default_benchmark: str = "split_cifar100",
    method: str | None = None,
) -> tuple:
    """Parses a command line into dataclasses.

    Args:
        groups (tuple of dataclasses): Dataclasses whose fields are options, including [`StreamArguments`].
        argv (`list[str]`, *optional*): Command line; default: `sys.argv[1:]`.
        default_benchmark (`str`, *optional*): The benchmark if neither `--benchmark` nor `--dataset` is given.
        method (`str`, *optional*): Name of the method, for the benchmark's tuned defaults.

    Returns:
        One instance of each dataclass.

    Raises:
        [`OptionError`]: An option or the benchmark does not exist, a value is not allowed, or the YAML file cannot be
            read.

    Example:

    ```py
    >>> from hf_clpeft.training.options import BackboneArguments, StreamArguments, parse

    >>> stream, backbone = parse((StreamArguments, BackboneArguments), ["--benchmark", "digits"])
    >>> backbone.backbone
    'hf-clpeft/vit-tiny-glyphs'

    ```
    """
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
