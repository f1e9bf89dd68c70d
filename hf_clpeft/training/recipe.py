"""What every recipe shares: its command line, building stream, model and trainer from it, and the closing table."""

import os
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from ..backbones import BackboneError
from ..bundled import BUNDLED_BACKBONES
from ..config import CONFIG_NAME, ConfigError, MethodConfig
from ..experts import ExpertError
from ..folder import settle
from ..hub.download import find_model
from ..hub.errors import HubError
from ..modeling import ContinualModel
from ..progress import disable_progress_bars
from ..report import PLOT_NAME, StreamReport
from ..streams import BENCHMARKS, StreamError, TaskStream, load_benchmark
from .arguments import ContinualTrainingArguments
from .processes import TrainingError, join_processes
from .steps import TrainingStopped
from .trainer import ContinualTrainer


OFFLINE_OPTION = "--benchmark digits"
PROBE_SECONDS = 5


@dataclass
class StreamArguments:
    """Which tasks to learn: a named benchmark, or any data set split by class or by domain."""

    benchmark: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(BENCHMARKS)}. Default: split_cifar100, unless --dataset is given."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder (Parquet or ImageFolder); with --benchmark, another copy of its data."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit of the data set's repo."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed, without a full download."})
    scenario: Literal["class", "domain"] = field(
        default="class", metadata={"help": "With --dataset: tasks bring new classes, or the same in new domains."}
    )
    num_tasks: int | None = field(default=None, metadata={"help": "Number of tasks (by class only)."})
    class_order_seed: int | None = field(default=None, metadata={"help": "Shuffle the order of classes."})
    train_split: str | None = field(default=None, metadata={"help": "Name of the split to learn."})
    test_split: str | None = field(default=None, metadata={"help": "Name of the split to test on; found if left out."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images; found if left out."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; found if left out."})
    domain_column: str | None = field(default=None, metadata={"help": "Column of domains (by domain only)."})
    max_train_samples_per_task: int | None = field(default=None, metadata={"help": "Use at most so many images."})
    max_test_samples_per_task: int | None = field(default=None, metadata={"help": "Use at most so many images."})

    def load(self) -> TaskStream:
        """Builds the stream."""
        options = {
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
    """Which frozen model to learn on."""

    backbone: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={"help": f"Repo id or folder; {', '.join(BUNDLED_BACKBONES)} comes with the package."},
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Commit of the backbone's repo."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the input in pixels, if not its own."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the frozen weights."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "What computes attention, as in transformers: sdpa, eager, flash_attention_2, ... Training in "
            "bfloat16 on a CPU is much faster with eager."
        },
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
        default="auto", metadata={"help": "shared, per_task, or auto: shared if tasks bring new classes."}
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


def run_recipe(method_arguments: type, make_method: Callable[..., MethodConfig], argv: list[str] | None = None):
    """Reads the command line and learns a stream with one method. The body of every recipe.

    Options come from, weakest first: the dataclasses, what suits the benchmark, the YAML file of `--config`, the
    command line.

    Args:
        method_arguments (dataclass): Options of the method, each with a help text.
        make_method (callable): Takes them as keywords, gives a [`MethodConfig`].
        argv (`list[str]`, *optional*): Command line without the program's name; default `sys.argv[1:]`.

    Returns:
        [`StreamReport`]
    """
    groups = (StreamArguments, BackboneArguments, ContinualTrainingArguments, method_arguments)
    try:
        stream_args, backbone_args, training_args, method_args = parse(groups, argv, method=make_method.__name__)
        require_hub(stream_args, backbone_args)
        report = learn(stream_args.load(), backbone_args, training_args, make_method(**asdict(method_args)))
    except (BackboneError, ConfigError, ExpertError, HubError, OSError, StreamError, TrainingError) as error:
        raise SystemExit(f"error: {error}") from error
    except TrainingStopped:
        print(f"Stopped, and all is saved. Go on with: {resuming_command()}", flush=True)
        raise SystemExit(0) from None
    print_reports([report], Path(training_args.output_dir, PLOT_NAME))
    return report


def resuming_command() -> str:
    """The command line of this program with what makes it go on."""
    argv = list(sys.argv)
    if not any(word.startswith("--resume_from_checkpoint") for word in argv):
        argv += ["--resume_from_checkpoint", "auto"]
    return shlex.join([Path(sys.executable).name, *argv])


def learn(
    stream: TaskStream,
    backbone_args: BackboneArguments,
    training_args: ContinualTrainingArguments,
    method: MethodConfig,
) -> StreamReport:
    """Learns a stream, from nothing or where `resume_from_checkpoint` says.

    Args:
        stream ([`TaskStream`]): Which tasks.
        backbone_args ([`BackboneArguments`]): Which frozen model.
        training_args ([`ContinualTrainingArguments`]): How to train.
        method ([`MethodConfig`]): With what.

    Returns:
        [`StreamReport`]

    Raises:
        [`ConfigError`]: The model to go on with was made with other options.
    """
    state = join_processes(training_args.ddp_timeout)
    if training_args.disable_tqdm or not state.is_main_process:
        disable_progress_bars()
    with state.main_process_first():
        source = _find_checkpoint(training_args)
        if source is not None:
            model = _resume(source, backbone_args, method, training_args.hub_token)
        else:
            model = ContinualModel.from_backbone(
                backbone_args.backbone,
                method,
                revision=backbone_args.backbone_revision,
                image_size=backbone_args.image_size,
                dtype=backbone_args.dtype,
                attn_implementation=backbone_args.attn_implementation,
            )
    return ContinualTrainer(model, training_args).learn_stream(stream)


def _find_checkpoint(args: ContinualTrainingArguments) -> str | None:
    """Folder or repo of the model to go on with."""
    if args.resume_from_checkpoint != "auto":
        return args.resume_from_checkpoint
    settle(args.output_dir)
    if Path(args.output_dir, CONFIG_NAME).is_file():
        return args.output_dir
    return None if args.push_repo is None else find_model(args.push_repo, args.hub_token)


def _resume(source: str, backbone_args: BackboneArguments, method: MethodConfig, token: str | None) -> ContinualModel:
    model = ContinualModel.from_pretrained(
        source,
        backbone=backbone_args.backbone,
        dtype=backbone_args.dtype,
        attn_implementation=backbone_args.attn_implementation,
        token=token,
    )
    for name, wanted in vars(method).items():
        found = getattr(model.config.method, name)
        if found != wanted and (name, wanted) != ("head", "auto"):  # what auto means is known once there is a task
            raise ConfigError(
                f"{source} was made with {name}={found!r}, not {wanted!r}. Go on with the same options, or begin anew "
                "without --resume_from_checkpoint."
            )
    size = model.config.backbone.image_size
    if backbone_args.image_size not in (None, size):
        raise ConfigError(f"{source} was made with image_size={size}, not {backbone_args.image_size}.")
    return model


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
        [`ConfigError`]: The YAML file has an option that does not exist, or the benchmark does not.

    Example:

    ```py
    >>> from hf_clpeft.training.recipe import BackboneArguments, StreamArguments, parse

    >>> stream, backbone = parse((StreamArguments, BackboneArguments), ["--benchmark", "digits"])
    >>> backbone.backbone
    'hf-clpeft/vit-tiny-glyphs'

    ```
    """
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(groups)
    parser.add_argument("--config", help="YAML file of options; the command line wins over it.")
    options = {f.name for group in groups for f in fields(group)}
    given, _ = parser.parse_known_args(argv)
    from_file = _read_yaml(given.config, options) if given.config else {}
    benchmark = given.benchmark or from_file.get("benchmark")
    if benchmark is None and not (given.dataset or from_file.get("dataset")):
        benchmark = default_benchmark
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {benchmark!r}; choose one of {', '.join(BENCHMARKS)}.")
    suited = BENCHMARKS[benchmark].options_for(method) if benchmark is not None else {}
    suited = {name: value for name, value in suited.items() if name in options}
    parser.set_defaults(**suited, **{"benchmark": benchmark})
    parser.set_defaults(**from_file)
    *parsed, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(parsed)


def _read_yaml(path: str, options: set[str]) -> dict:
    import yaml

    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    unknown = sorted(set(values) - options)
    if unknown:
        raise ConfigError(f"{path}: there is no option {unknown[0]!r}; see --help.")
    return values


def require_hub(stream_args: StreamArguments, backbone_args: BackboneArguments) -> None:
    """Ends the program in one line, at once, if something must come from the Hub and the Hub cannot be reached.

    With `HF_HUB_OFFLINE=1` nothing is asked and the libraries use what is in their cache.

    Args:
        stream_args ([`StreamArguments`]): May name a data set on the Hub.
        backbone_args ([`BackboneArguments`]): May name a model on the Hub.

    Raises:
        `SystemExit`: With the command that works offline.
    """
    from huggingface_hub import constants

    dataset = stream_args.dataset or BENCHMARKS[stream_args.benchmark].dataset
    needed = [dataset] if isinstance(dataset, str) and not Path(dataset).exists() else []
    if backbone_args.backbone not in BUNDLED_BACKBONES and not Path(backbone_args.backbone).exists():
        needed.append(backbone_args.backbone)
    if not needed or constants.HF_HUB_OFFLINE:
        return
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        command = f"python {os.path.relpath(sys.argv[0])} {OFFLINE_OPTION}"
        raise SystemExit(
            f"error: {' and '.join(needed)} must come from {constants.ENDPOINT}, which cannot be reached "
            f"({getattr(error, 'reason', error)}). This works offline: {command}"
        ) from None


def print_reports(reports: list[StreamReport], picture: str | Path) -> None:
    """Prints one row per report and where the picture is, on the main process.

    Args:
        reports (`list[StreamReport]`): Runs to set side by side.
        picture (`str` or `Path`): Path of the picture that goes with them; the models are beside it.
    """
    from accelerate import PartialState
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    if not PartialState().is_main_process:
        return
    title = f"{reports[0].stream}: accuracy after {len(reports[0].tasks)} tasks, every image routed by itself"
    table = Table(title=title, box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    measures = {
        "average_accuracy": "average",
        "average_incremental_accuracy": "incre-\nmental",
        "forgetting": "for-\ngetting",
        "routing_accuracy": "routing",
        "oracle_accuracy": "oracle",
    }
    for header in (*measures.values(), "expert\nparams", "sec"):
        table.add_column(header, justify="right")
    for report in reports:
        summary = report.summary()
        table.add_row(
            report.method,
            *(f"{100 * summary[name]:.1f}" if name in summary else "–" for name in measures),
            f"{max(report.expert_parameters):,}",
            f"{sum(sum(parts.values()) for parts in report.seconds):.0f}",
        )
    Console().print(table)
    print(f"results: {Path(picture).parent}    picture: {picture}")
