"""The program of every recipe: parses the command line, loads stream and model, trains, and prints the results."""

import os
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from accelerate import PartialState

from ..backbones.bundled import BUNDLED_BACKBONES
from ..config import MethodOptions
from ..config.errors import ConfigError, errors_in_one_line
from ..config.method import RESOLVED
from ..config.model import CONFIG_NAME, ContinualConfig
from ..hub.download import find_model
from ..hub.outbox import Outbox
from ..model import ContinualModel
from ..reports.report import PLOT_NAME, StreamReport
from ..storage.files import as_saved
from ..streams import BENCHMARKS, TaskStream
from .arguments import ContinualTrainingArguments
from .console import print_reports
from .options import (
    BackboneArguments,
    RunArguments,
    StreamArguments,
    choice_of,
    options_of,
    parse,
    read_method,
)
from .output import check_output
from .plan import print_plan
from .processes import join_processes
from .progress import disable_progress_bars
from .steps import TrainingStopped
from .trainer import ContinualTrainer


OFFLINE_OPTION = "--benchmark digits"
PROBE_SECONDS = 5


def run_recipe(*methods: str, argv: list[str] | None = None) -> StreamReport | None:
    """Parses the command line and learns a stream with one method: the body of every recipe.

    The command line has the options of the stream, the backbone, the training and the method's `Config`. Later sources
    override earlier ones: defaults of the dataclasses, tuned defaults of the benchmark, the YAML file of `--config`,
    the command line.

    Args:
        methods (`str`): Name of the method. If there are several, `--method` selects one; default: the first.
        argv (`list[str]`, *optional*): Command line without the program's name; default: `sys.argv[1:]`.

    Returns:
        [`StreamReport`]; `None` with `--dry_run`, which prints the plan and stops.

    Example:

    ```py
    >>> from hf_clpeft import run_recipe

    >>> run_recipe("ncm", argv=["--benchmark", "digits", "--dry_run"])
    ncm on digits: 5 tasks
    task      classes or domain  train  test  expert  head  steps
    ...

    ```
    """
    groups: tuple[type, ...] = (StreamArguments, BackboneArguments, ContinualTrainingArguments, RunArguments)
    argv = sys.argv[1:] if argv is None else argv
    with errors_in_one_line():
        name = read_method(methods, argv) if len(methods) > 1 else methods[0]
        choice = (choice_of(methods),) if len(methods) > 1 else ()
        parsed = parse((*groups, *choice, options_of(name)), argv, method=name)
        stream_args, backbone_args, training_args, run_args, *_, method = parsed
        if training_args.resume_from_checkpoint is None and not run_args.dry_run:
            check_output(training_args)
        require_hub(stream_args, backbone_args)
        stream = stream_args.load()
        if run_args.dry_run:
            model, then = open_model(backbone_args, training_args, method), command_line("--dry_run")
            print_plan(model, stream, training_args, f"Nothing was learnt (--dry_run). Learn it with: {then}")
            return None
        try:
            report = learn(stream, backbone_args, training_args, method)
        except TrainingStopped as stopped:
            if PartialState().is_main_process:
                print(f"Stopped, and all is saved. Go on with: {resuming_command()}", flush=True)
            raise SystemExit(128 + stopped.signal) from None
    folder, repo = Path(training_args.output_dir), training_args.push_repo
    then = f"hf-clpeft demo {shlex.quote(str(folder))}    or    hf-clpeft push {shlex.quote(str(folder))} ME/NAME"
    if repo:
        outbox = Outbox(folder)
        waits = f"hf-clpeft push {shlex.quote(str(folder))}"
        then = waits if outbox.pending() else f"hf-clpeft demo {shlex.quote(outbox.target.repo_id)}"
    print_reports([report], f"results: {folder}    picture: {folder / PLOT_NAME}", f"next: {then}")
    return report


def without(option: str, words: Iterable[str]) -> list[str]:
    """Words of a command line, except for an option and its values, however it is spelt.

    Example:

    ```py
    >>> from hf_clpeft.training.recipe import without

    >>> without("--num_tasks", ["pets", "--num-tasks", "2", "--seeds", "0", "1"])
    ['pets', '--seeds', '0', '1']

    ```
    """
    kept, inside = list[str](), False
    for word in words:
        name, equals, _ = word.partition("=")
        named = name.replace("-", "_") == option.replace("-", "_")
        inside = named and not equals if name.startswith("--") else inside
        if not (named or inside):
            kept.append(word)
    return kept


def command_line(leave_out: str | None = None) -> str:
    """The command line of this program, except for an option to leave out."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    # Without --quiet, the launcher prints its own traceback after an error message.
    program = ["accelerate", "launch", "--quiet"] if launched else [Path(sys.executable).name]
    return shlex.join([*program, *(sys.argv if leave_out is None else without(leave_out, sys.argv))])


def resuming_command() -> str:
    """The command line of this program that resumes the run."""
    resumes = any(word.replace("-", "_").startswith("__resume_from_checkpoint") for word in sys.argv)
    return command_line("--overwrite_output_dir") + ("" if resumes else " --resume_from_checkpoint auto")


def learn(
    stream: TaskStream,
    backbone_args: BackboneArguments,
    training_args: ContinualTrainingArguments,
    method: MethodOptions,
) -> StreamReport:
    """Learns a stream with a new model, or with the one of `resume_from_checkpoint`.

    Raises:
        [`ConfigError`]: The model to resume was made with other options, or `output_dir` holds another one.
    """
    if training_args.resume_from_checkpoint is None:
        check_output(training_args)
    model = open_model(backbone_args, training_args, method)
    return ContinualTrainer(model, training_args).learn_stream(stream)


def open_model(
    backbone_args: BackboneArguments, training_args: ContinualTrainingArguments, method: MethodOptions
) -> ContinualModel:
    """A new model, or the one of `resume_from_checkpoint`.

    Raises:
        [`ConfigError`]: The model to resume was made with other options.
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
                **backbone_args.loading,
            )
    return model


def _find_checkpoint(args: ContinualTrainingArguments) -> str | None:
    """Folder or repo of the model to resume, if any."""
    if args.resume_from_checkpoint != "auto":
        return args.resume_from_checkpoint
    if (as_saved(args.output_dir) / CONFIG_NAME).is_file():
        return args.output_dir
    return None if args.push_repo is None else find_model(args.push_repo, args.hub_token)


def _resume(source: str, backbone_args: BackboneArguments, method: MethodOptions, token: str | None) -> ContinualModel:
    model = ContinualModel.from_pretrained(
        source, backbone=backbone_args.backbone, token=token, **backbone_args.loading
    )
    check_same_options(model.config, method.to_dict(), source)
    size = model.config.backbone.image_size
    if backbone_args.image_size not in (None, size):
        raise ConfigError(f"{source} was made with image_size={size}, not {backbone_args.image_size}.")
    return model


def check_same_options(config: ContinualConfig, wanted: dict, source: str) -> None:
    """Raises [`ConfigError`] if a model was made with other options of its method than those wanted."""
    saved = config.method.to_dict()
    for name, value in wanted.items():
        found = saved.get(name)
        if found != value and not (name in RESOLVED and value == "auto"):
            raise ConfigError(
                f"{source} was made with {name}={found!r}, not {value!r}. Go on with the same options, or begin a new "
                "model."
            )


def require_hub(stream_args: StreamArguments, backbone_args: BackboneArguments) -> None:
    """Fails early if data set or backbone must be downloaded and the Hub cannot be reached.

    With `HF_HUB_OFFLINE=1` no request is made, and the libraries use their cache.

    Raises:
        `SystemExit`: With a command that works offline.
    """
    from huggingface_hub import constants

    dataset: str | Callable | None = stream_args.dataset
    if not dataset:
        assert stream_args.benchmark is not None
        dataset = BENCHMARKS[stream_args.benchmark].dataset
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
        command = f"python {shlex.quote(os.path.relpath(sys.argv[0]))} {OFFLINE_OPTION}"
        raise SystemExit(
            f"error: {' and '.join(needed)} must come from {constants.ENDPOINT}, which cannot be reached "
            f"({getattr(error, 'reason', error)}). What is in the cache is used with HF_HUB_OFFLINE=1; this works "
            f"offline: {command}"
        ) from None
