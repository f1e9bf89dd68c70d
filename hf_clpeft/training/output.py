"""Checks of the output folder: no other model or run is overwritten silently."""

from pathlib import Path

from ..config.errors import ConfigError
from ..config.model import CONFIG_NAME, ContinualConfig
from ..storage.folder import READY
from ..storage.lineage import difference
from .arguments import ContinualTrainingArguments
from .checkpoints import FOLDER as CHECKPOINTS
from .parallel import FOLDER as PARALLEL


WRITTEN = ("README.md", "preprocessor_config.json", "experts")  # names that other contents of the folder may have, too
WAYS_OUT = (
    "Continue it (--resume_from_checkpoint auto, or ContinualModel.from_pretrained), replace it "
    "(--overwrite_output_dir), or choose another output_dir."
)


def check_output(
    args: ContinualTrainingArguments, config: ContinualConfig | None = None, new_run: bool = True
) -> None:
    """Raises [`ConfigError`] if a run would overwrite another model, or another run's checkpoints.

    Args:
        args ([`ContinualTrainingArguments`]): `overwrite_output_dir` allows it.
        config ([`ContinualConfig`], *optional*): Configuration of the model to train; `None` for a new model.
        new_run (`bool`, *optional*, defaults to `True`): Whether the run has not started yet.
    """
    if args.overwrite_output_dir:
        return
    check_free(args.output_dir, config)
    if new_run and args.resume_from_checkpoint is None:
        check_no_state(args.output_dir)


def check_free(folder: str | Path, config: ContinualConfig | None = None) -> None:
    """Raises [`ConfigError`] if saving a model (`None`: a new one) would overwrite anything but an earlier state.

    Example:

    ```py
    >>> from hf_clpeft.backbones.bundled import bundled_folder
    >>> from hf_clpeft.training.output import check_free

    >>> check_free("a/new/folder")
    >>> check_free(bundled_folder("hf-clpeft/s-lora-digits"))
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: ...s-lora-digits holds another model, which would be lost: ...

    ```
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={folder} is a file; choose a folder.")
    # A save that was killed while being committed is still in READY.
    places = [place for place in (folder / READY, folder) if (place / CONFIG_NAME).is_file()]
    if not places:
        found = [name for name in WRITTEN if (folder / name).exists()]
        if found:
            raise ConfigError(
                f"{folder} holds {found[0]}, which belongs to no model and would be overwritten. Choose another "
                "output_dir, or allow it with --overwrite_output_dir."
            )
        return
    try:
        there = ContinualConfig.load(places[0])
    except ConfigError as error:
        raise ConfigError(
            f"{folder} holds a {CONFIG_NAME} that would be overwritten, and is not an hf_clpeft model "
            f"({error}). Choose another output_dir, or allow it with --overwrite_output_dir."
        ) from error
    if not there.tasks:
        return
    tasks = f"one that has learnt {len(there.tasks)} task{'s' if len(there.tasks) > 1 else ''}"
    what = tasks if config is None else difference(config, there)
    if what is not None:
        raise ConfigError(f"{folder} holds another model, which would be lost: {what}. {WAYS_OUT}")


def check_no_state(folder: str | Path) -> None:
    """Raises [`ConfigError`] if a folder holds checkpoints of an interrupted run, which a new run would delete."""
    inside = Path(folder, PARALLEL).glob(f".*/{CHECKPOINTS}")  # of tasks that are trained apart
    for place in (Path(folder, CHECKPOINTS), Path(folder, PARALLEL), *sorted(inside)):
        states = sorted(place.glob("[!.]*"))
        if states:
            where = states[-1].relative_to(folder).as_posix()
            raise ConfigError(f"{folder} holds the state of an interrupted run ({where}). {WAYS_OUT}")
