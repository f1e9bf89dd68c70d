"""`hf-clpeft evaluate`: how good a model is on labelled pictures."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config.text import one_line, percent
from .common import AsJson, BackbonePath, Device, Repo, Token, end_with, load_model, show


if TYPE_CHECKING:
    from ..scoring import Score


def evaluate(
    repo: Repo,
    data: Annotated[
        str, typer.Argument(help="Folder with a folder for each class, Hub id of a data set, or name of a benchmark.")
    ],
    split: Annotated[str | None, typer.Option(help="Default: the test split; without one, all pictures.")] = None,
    reject_rate: Annotated[float, typer.Option(min=0.01, max=1, help="Count what `predict` withholds.")] = 0.05,
    as_json: AsJson = False,
    config_name: Annotated[str | None, typer.Option("--name", help="Configuration of the data set.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Default: detected.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: detected.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    backbone: BackbonePath = None,
    token: Token = None,
    device: Device = None,
) -> None:
    """Measure a model on labelled pictures: accuracy per task and class, routing, calibration, rejection."""
    from ..scoring import evaluate as measure, labelled_images
    from ..training.progress import disable_progress_bars

    disable_progress_bars(transfers=not sys.stderr.isatty())
    bad: list[str] = []
    images = labelled_images(data, split, config_name, bad=bad, image_column=image_column, label_column=label_column)
    model = load_model(repo, backbone, token, device)
    found = measure(model, _counted(images), batch_size, reject_rate)
    if as_json:
        show(found.to_dict(), as_json=True)
    else:
        total, rate = found.total, found.reject_rate
        says = {
            "pictures": total.images,
            "accuracy": percent(total.accuracy),
            "routing accuracy": percent(total.routing_accuracy),
            "calibration error": percent(found.calibration_error),
            "rejected": percent(total.rejected) + ("" if rate is None else f" at --reject-rate {rate:g}"),
        }
        show({name: value for name, value in says.items() if value != "–"}, as_json=False)
        for title, scores in (("task", found.tasks), ("class", found.classes), ("unknown class", found.unknown)):
            if scores:
                print()
                show([_row(title, name, score) for name, score in scores.items()], as_json=False)
    end_with([one_line(line) for line in bad])


def _row(title: str, name: str, score: "Score") -> dict[str, Any]:
    numbers = asdict(score)
    shares = ("accuracy", "routing_accuracy", "rejected")
    return {
        title: name,
        "pictures": score.images,
        **{share.replace("_accuracy", ""): percent(numbers[share], unit="") for share in shares},
        "mistaken for": score.mistaken_for or "",
    }


def _counted(images: Iterator[tuple[Any, str]]) -> Iterator[tuple[Any, str]]:
    from ..training.progress import progress_bar

    return progress_bar(images, desc="Evaluating", unit="image")
