"""`hf-clpeft predict`: classifies pictures."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config.text import one_line
from .common import BackbonePath, Device, Repo, Token, end_with, load_model
from .rows import Format, write_rows
from .sorting import Sorter, check_folder
from .sources import find_pictures


if TYPE_CHECKING:
    from ..model import ContinualModel

WIDEST = 30  # characters of a name in the table


def predict(
    repo: Repo,
    images: Annotated[
        list[str], typer.Argument(help="Pictures, folders, patterns, or - for a list of paths on stdin.")
    ],
    form: Annotated[Format, typer.Option("--format", help="How to print, row by row.")] = Format.table,
    as_json: Annotated[bool, typer.Option("--json", "--as-json", help="Short for --format json.")] = False,
    copy_to: Annotated[Path | None, typer.Option(help="Copy pictures to a folder per class in this one.")] = None,
    backbone: BackbonePath = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    reject_rate: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Withhold the label of out-of-distribution pictures; at most this share of in-distribution ones is "
            "withheld by mistake.",
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Likeliest classes and nearest experts in CSV and JSON.")] = 1,
    token: Token = None,
    device: Device = None,
) -> None:
    """Classify pictures: label, score, and expert of each. Goes on after those that cannot be read, and names them."""
    from dataclasses import fields

    from ..prediction import Prediction

    if copy_to is not None:
        check_folder(copy_to)
    paths = find_pictures(images)
    model = load_model(repo, backbone, token, device)
    bad: list[str] = []
    rows = _classified(model, paths, batch_size, {"reject_rate": reject_rate, "top_k": top_k}, bad)
    if copy_to is not None:
        rows = _sorted(rows, Sorter(copy_to, model.config.classes))
    labels, experts = model.config.classes, model.bank.names
    widths = {"label": _widest(["label", *labels]), "score": 5, "expert": _widest(["expert", *experts]), "distance": 8}
    if model.can_reject:
        widths["typicality"] = 10
    columns: dict[str, Any] = dict.fromkeys(("image", *(column.name for column in fields(Prediction))))
    columns |= {"classes": dict.fromkeys(labels[:top_k]), "experts": dict.fromkeys(experts[:top_k])}
    write_rows(rows, Format.json if as_json else form, {**widths, "image": 5}, columns)
    end_with(bad)


def _classified(
    model: "ContinualModel", paths: Iterator[Path], batch_size: int, options: dict, bad: list[str]
) -> Iterator[dict]:
    """Rows of the pictures that can be read; what is wrong with the others is added to `bad`."""
    from dataclasses import asdict

    from ..backbones.pictures import PictureError, open_image
    from ..training.progress import progress_bar

    seen = 0
    with progress_bar(desc="Predicting", unit="image", disable=sys.stdout.isatty()) as bar:
        while batch := list(islice(paths, batch_size)):
            pictures = {}
            for number, path in enumerate(batch):
                try:
                    pictures[number] = open_image(path)
                except PictureError as error:
                    bad.append(one_line(error))
            found = model.predict(list(pictures.values()), batch_size=batch_size, **options) if pictures else []
            for number, prediction in zip(pictures, found, strict=True):
                yield {"image": str(batch[number]), **asdict(prediction)}
            seen += len(batch)
            bar.update(len(batch))
    if not seen:
        print("The list is empty: there is no picture to classify.", file=sys.stderr)


def _sorted(rows: Iterator[dict], sorter: Sorter) -> Iterator[dict]:
    for row in rows:
        sorter.copy(Path(row["image"]), row["label"])
        yield row


def _widest(names: list[str]) -> int:
    return min(WIDEST, max(map(len, names)))
