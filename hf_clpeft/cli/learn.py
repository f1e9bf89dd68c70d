"""`hf-clpeft learn`: makes a model of one's own pictures, or teaches one that is there a further task."""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..config.text import percent, printable
from .common import quieten


if TYPE_CHECKING:
    from ..model import ContinualModel
    from ..streams import Task, TaskStream
    from ..training import ContinualTrainingArguments
    from ..training.destination import Destination

DECIDED = (  # by --to, or made for streams of several tasks
    "output_dir",
    "overwrite_output_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_revision",
    "resume_from_checkpoint",
    "experts_from",
    "task_parallel",
    "forward_transfer",
)
RATES = ("learning_rate", "head_learning_rate")
MOST_BAD = 0.1  # share of pictures that cannot be read and are left out, if no number is given
MOST_CLASSES = 8  # that are named
ABOUT = """Make a model of your own pictures, or teach the one that is there new classes, without the old pictures.

PICTURES is a folder with a folder for each class (my/pictures/robin/1.jpg), or the id of a data set on the Hub."""


@dataclass
class LearnArguments:
    to: str = field(
        metadata={
            "help": "Where the model goes, or is: OWNER/NAME is a repo on the Hub, unless there is such a folder; all "
            "else is a folder, ./birds for example."
        }
    )
    name: str | None = field(
        default=None, metadata={"help": "Name of the task, a tag on the Hub. Default: that of the folder."}
    )
    domain: str | None = field(
        default=None,
        metadata={"help": "The pictures show classes that the model knows in another domain, such as sketches."},
    )
    tune: bool = field(
        default=False,
        metadata={"help": "Choose the learning rates on a fifth of the first task's pictures; six short trainings."},
    )


def learn(context: typer.Context) -> None:
    """Make a model of your own pictures, or teach the one that is there new classes, without the old pictures."""
    from ..config.errors import ConfigError
    from ..streams import TaskStream
    from ..training.destination import Destination

    quieten()
    there = Destination(*_read_goal(context.args))  # which decides which method's options there are
    _say("to", f"{there.place.name}, a {'repo on the Hub' if there.place.is_repo else 'folder'}: {there.place.why}")
    options = _read(context.args, there)
    most = options["training"].max_bad_images if "max_bad_images" in options["named"] else MOST_BAD
    reading = {**options["data"].reading(), "max_bad_images": most}
    stream = TaskStream.class_incremental(options["pictures"], num_tasks=1, **reading)
    task = _name_task(stream, options["learn"], there)
    _check_classes(task, there, options["learn"].domain)
    if options["learn"].tune and there.there is not None and there.there.tasks:
        raise ConfigError("--tune is for the first task; later ones take the same learning rates.")
    there.check_writable()
    model = _open(options, there)
    args = _training_arguments(options, there, task, model)
    if model.report is not None and model.report.tasks:  # the stream goes on
        stream = TaskStream([task], model.report.stream, model.report.dataset)
    else:
        stream = TaskStream([task], stream.name, stream.dataset)
    _train(model, args, stream, there)
    _close(model, task, there)


def _say(what: str, how: str) -> None:
    print(f"{what:<10}  {printable(how)}", flush=True)


def _read_goal(words: list[str]) -> tuple[str, str | None, bool | None]:
    """Where the model goes, the token, and whether a new repo is private. Shows the help instead, if asked for."""
    from ..training import ContinualTrainingArguments
    from ..training.parsing import OptionParser

    if {"-h", "--help"} & {*words}:
        _read(words, None)
    parser = OptionParser((LearnArguments, ContinualTrainingArguments), add_help=False)
    goal, _ = parser.parse_known_args(words)
    return goal.to, goal.hub_token, goal.hub_private_repo


def _read(words: list[str], there: "Destination | None") -> dict[str, Any]:
    """Parses the command line, with the options of the method that is chosen or there."""
    from argparse import RawDescriptionHelpFormatter

    from ..config.errors import ConfigError, OptionError
    from ..methods import METHODS
    from ..training import ContinualTrainingArguments
    from ..training.choices import RECOMMENDED
    from ..training.options import BackboneArguments, DataArguments, choice_of, options_of, read_method
    from ..training.parsing import OptionParser
    from ..training.recipe import check_same_options

    names = (RECOMMENDED, *(name for name in METHODS if name != RECOMMENDED))
    name = read_method(names, words)
    config = None if there is None else there.there
    if config is not None:
        if config.method.name not in METHODS:
            raise ConfigError(
                f"{there.place.name} is a model of the method {config.method.name!r}, which is not in this package: "  # type: ignore[union-attr]
                "teach it in Python, after importing the file that defines it."
            )
        if name != config.method.name and any(word.partition("=")[0] == "--method" for word in words):
            raise OptionError(f"--method {name}: the model there is one of {config.method.name}; leave it out.")
        name = config.method.name
    groups = (LearnArguments, choice_of(names), options_of(name), BackboneArguments, DataArguments)
    parser = OptionParser(
        (*groups, ContinualTrainingArguments),
        without=DECIDED,
        prog="hf-clpeft learn",
        description=f"{ABOUT}\n\nThe options of {name} stand after --method; choose another to see its own.",
        usage="hf-clpeft learn PICTURES --to BIRDS [options]",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("pictures", metavar="PICTURES", help="Folder of class folders, or id of a data set.")
    if "adapt" in parser.names:
        # Without adaptation to the first pictures, models of different people can be combined, and any task removed.
        parser.set_defaults(adapt=False)
    learn, _, method, backbone, data, training, rest = parser.read(words)
    named = parser.named(words)
    if config is not None:
        given = {name: value for name, value in method.to_dict().items() if name in named}
        check_same_options(config, given, there.place.name)  # type: ignore[union-attr]
    return {
        "learn": learn,
        "method": method,
        "backbone": backbone,
        "data": data,
        "training": training,
        "pictures": rest.pictures,
        "named": named,
    }


def _name_task(stream: "TaskStream", chosen: LearnArguments, there: "Destination") -> "Task":
    from ..config.errors import ConfigError
    from ..training.choices import choose_name
    from ..training.plan import count

    taken = [] if there.there is None else [*(task.name for task in there.there.tasks), *there.there.removed]
    if chosen.name in taken:
        raise ConfigError(f"--name {chosen.name}: {there.place.name} has learnt a task of this name; choose another.")
    task = replace(stream[0], name=chosen.name or choose_name(stream.name, taken), domain=chosen.domain)
    images, held_out = count(task.train), count(task.test)
    names = ", ".join(task.classes[:MOST_CLASSES]) + ", ..." * (len(task.classes) > MOST_CLASSES)
    numbers = f"{'?' if images is None else images} pictures to learn from"
    numbers += "" if task.test is None else f", {'?' if held_out is None else held_out} to measure with"
    _say("task", f"{task.name}: {len(task.classes)} class{'es' * (len(task.classes) != 1)} ({names}), {numbers}")
    return task


def _check_classes(task: "Task", there: "Destination", domain: str | None) -> None:
    from ..config.errors import ConfigError
    from ..methods import METHODS
    from ..streams import StreamError

    config = there.there
    if config is None or not config.tasks:
        if len(task.classes) == 1:
            raise StreamError(
                f"There is a single class, {task.classes[0]!r}, and a model tells at least two apart: give each class "
                "a folder of its own, all of them in the folder that you name. More can be added later, one by one."
            )
        return
    known = [label for label in task.classes if label in config.classes]
    if known and domain is None:
        where = next(each.name for each in config.tasks if known[0] in each.classes)
        raise ConfigError(
            f"{there.place.name} knows {', '.join(known[:3])} already, from {where}: leave those pictures out. If "
            "they show what it knows in another style or place, name that with --domain."
        )
    if len(task.classes) == 1 and not METHODS[config.method.name].takes_one_class:
        raise StreamError(
            f"There is a single class, {task.classes[0]!r}, and {config.method.name} needs two or more in a task."
        )


def _open(options: dict[str, Any], there: "Destination") -> "ContinualModel":
    """The model that is there, or a new one; says which method and backbone it has."""
    from ..backbones.bundled import BUNDLED_BACKBONES
    from ..config.errors import ConfigError
    from ..model import ContinualModel
    from ..prediction import best_device
    from ..training.choices import RECOMMENDED, USUAL_BACKBONE, choose_backbone

    chosen, named, token = options["backbone"], options["named"], options["training"].hub_token
    how = {"dtype": chosen.dtype, "attn_implementation": chosen.attn_implementation, "token": token}
    if there.there is not None:
        config, moved = there.there, chosen.backbone if "backbone" in named else None
        size = config.backbone.image_size
        if chosen.image_size not in (None, size):
            raise ConfigError(f"{there.place.name} was made with image_size={size}, not {chosen.image_size}.")
        _say("method", f"{config.method.name}, as before")
        _say("backbone", moved or f"{config.backbone.name_or_path}, as before")
        return ContinualModel.from_pretrained(there.place.name, backbone=moved, **how)
    method = options["method"]
    why = ", the one to begin with" if method.name.startswith(RECOMMENDED) else ""
    if getattr(method, "adapt", None) is False and "adapt" not in named:
        why += ", with adapt=False, so that tasks can be removed and models combined; --adapt is more accurate"
    _say("method", f"{method.name}{why}")
    name, reason = chosen.backbone, "as you chose"
    if "backbone" not in named:
        name, reason = choose_backbone(token)
    _say("backbone", f"{name}, {reason}")
    if name == USUAL_BACKBONE and "backbone" not in named and best_device(None).type == "cpu":
        _say("", "Without a GPU it takes minutes; --image_size 112 is four times as fast, and less accurate.")
    if name in BUNDLED_BACKBONES:
        _say("", f"WARNING: it is made for drawn letters and signs; for photographs: --backbone {USUAL_BACKBONE}")
    if there.place.is_repo and Path(name).is_dir():
        _say("", f"It is a folder of this machine: later commands need --backbone {name}, as others do who have it.")
    return ContinualModel.from_backbone(
        name, method, revision=chosen.backbone_revision, image_size=chosen.image_size, **how
    )


def _training_arguments(
    options: dict[str, Any], there: "Destination", task: "Task", model: "ContinualModel"
) -> "ContinualTrainingArguments":
    """The arguments given, and those chosen in their place; says which."""
    from ..training.choices import choose_batch_size, choose_epochs
    from ..training.plan import count

    args, named, images = options["training"], options["named"], count(task.train)
    args = replace(
        args,
        output_dir=str(there.folder),
        push_to_hub=there.place.is_repo,
        hub_model_id=there.place.name if there.place.is_repo else None,
        resume_from_checkpoint="auto" if there.interrupted else None,
    )
    if there.place.is_repo and args.num_examples and not args.hub_private_repo:
        _say("examples", f"up to {args.num_examples} pictures go along, for people to try it; --num_examples 0: none")
    if there.interrupted:
        _say("", "An earlier run was interrupted here: if it was the same one, it goes on after its last checkpoint.")
    if not model.method.trains:
        if options["learn"].tune:
            from ..config.errors import OptionError

            raise OptionError(
                f"--tune: {model.config.method.name} with these options makes no training steps, so that there is no "
                "learning rate to choose."
            )
        return args
    chosen: dict[str, Any] = {}
    if images is not None and "train_batch_size" not in named:
        chosen["train_batch_size"] = choose_batch_size(images)
    if images is not None and "num_train_epochs" not in named:
        chosen["num_train_epochs"] = choose_epochs(images, chosen.get("train_batch_size", args.train_batch_size))
    former = model.report.environment.get("arguments") if model.report is not None else None
    if isinstance(former, dict) and model.config.tasks:
        chosen |= {name: former[name] for name in RATES if name in former and name not in named}
    args = replace(args, **chosen)
    if options["learn"].tune:
        args = replace(args, **_tune(model, args, task))
    _say("training", f"{args.num_train_epochs} passes over the pictures, {args.train_batch_size} at a time")
    _say("", f"--learning_rate {args.learning_rate:g} --head_learning_rate {args.head_learning_rate:g}")
    return args


def _tune(model: "ContinualModel", args: "ContinualTrainingArguments", task: "Task") -> dict[str, float]:
    """The learning rates that are best on held-out pictures."""
    from copy import copy, deepcopy

    from ..config import ContinualConfig
    from ..model import ContinualModel
    from ..training.tuning import Trial, best_of, tune

    def new_model() -> ContinualModel:
        return ContinualModel(
            deepcopy(model.backbone), ContinualConfig(copy(model.config.method), model.config.backbone)
        )

    def tell(trial: Trial) -> None:
        rates = f"rates {trial.learning_rate:g} and {trial.head_learning_rate:g}"
        _say("tuning", f"{percent(trial.accuracy)} with {rates}")

    best = best_of(tune([task], new_model, replace(args, disable_tqdm=True), after_trial=tell))
    return dict(zip(RATES, best[1:], strict=True))


def _train(
    model: "ContinualModel", args: "ContinualTrainingArguments", stream: "TaskStream", there: "Destination"
) -> None:
    """Learns the task; with smaller batches if memory does not suffice."""
    from ..training import ContinualTrainer
    from ..training.choices import is_out_of_memory
    from ..training.steps import TrainingStopped

    while True:
        try:
            ContinualTrainer(model, args).learn_stream(stream)
            return
        except TrainingStopped as stopped:
            print("Stopped, and all is saved. The same command goes on from here.", flush=True)
            raise SystemExit(128 + stopped.signal) from None
        except RuntimeError as error:
            size = max(args.train_batch_size, args.eval_batch_size)
            if not is_out_of_memory(error) or size == 1:
                raise
            smaller = {name: min(getattr(args, name), size // 2) for name in ("train_batch_size", "eval_batch_size")}
            args = replace(args, **smaller)
            _say("", f"Out of memory; again with {size // 2} pictures at a time.")


def _close(model: "ContinualModel", task: "Task", there: "Destination") -> None:
    """Says how good it is, and what comes next."""
    from ..config.errors import HfClpeftError

    assert model.report is not None
    pushed, place, home = there.done(), shlex.quote(there.place.name), model.config.backbone.name_or_path
    own = f" --backbone {shlex.quote(home)}" if there.place.is_repo and Path(home).is_dir() else ""
    accuracy = model.report.accuracy_matrix[-1][-1]
    held_out = f"{percent(accuracy)} on the pictures of {task.name} that were held out"
    _say("accuracy", "not measured, as no picture was held out" if task.test is None else held_out)
    tasks = len(model.config.tasks)
    _say("it knows", f"{len(model.config.classes)} classes of {tasks} task{'s' * (tasks != 1)}")
    if not pushed:
        raise HfClpeftError(
            f"{task.name} is learnt, and could not be pushed. It waits in {there.folder}; send it by `hf-clpeft push "
            f"{shlex.quote(str(there.folder))} {place}`."
        )
    _say("next", f"hf-clpeft predict {place} PICTURE{own}    or    hf-clpeft demo {place}{own}")
    _say("", f"hf-clpeft learn MORE/PICTURES --to {place}{own}    adds classes; the old pictures are not needed")
    if not there.place.is_repo:
        _say("", f"hf-clpeft push {place} ME/NAME    shares it")
