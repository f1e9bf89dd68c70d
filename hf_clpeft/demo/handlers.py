"""What the page and its API can be asked: one method for each."""

import functools
import html
import inspect
import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

import gradio as gr
import pandas as pd
import PIL.Image
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from ..config.checks import fits
from ..config.errors import HfClpeftError
from ..model import ContinualModel
from . import views
from .drawing import scan
from .models import Models
from .pictures import VisitorError, open_picture, read_uploads
from .teaching import sort_pictures, teach


NEAREST = "nearest"
P = ParamSpec("P")
R = TypeVar("R")
TABLE = ["picture", "answer", "score", "expert", "distance", "typicality", "problem"]


def friendly(method: Callable[P, R]) -> Callable[P, R]:
    """Shows a visitor what the library says, and nothing of the server; a request may hold values of any type."""
    signature, hints = inspect.signature(method), get_type_hints(method)

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name in hints and not fits(value, hints[name]):
                    wanted = getattr(hints[name], "__name__", hints[name])
                    raise VisitorError(f"{name} must be of type {wanted}, and not {type(value).__name__}.")
            return method(*args, **kwargs)
        except HfClpeftError as error:
            # Shown as HTML, with names that strangers gave their files.
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None

    return wrapper


class Handlers:
    """Answers for one [`Models`].

    Args:
        models ([`Models`]): The models.
        examples (sequence of `Path`): Pictures whose answers are compared before and after teaching.
        reject_rate (`float`, *optional*): See [`ContinualModel.predict`]; without prototypes nothing is rejected.
    """

    def __init__(self, models: Models, examples: Sequence[Path] = (), reject_rate: float = 0.05):
        self.models = models
        self.examples = [open_picture(path) for path in examples]
        self.reject_rate = reject_rate

    # Try it

    @friendly
    def predict(
        self, picture: str | None, expert: str | None = NEAREST, key: str | None = ""
    ) -> tuple[str, dict[str, float] | None, dict, dict | None]:
        """Classify one picture. Its expert is the one with the nearest prototype, unless another is named.

        Args:
            picture: The picture: PNG, JPEG, WebP, GIF, BMP or TIFF.
            expert: "nearest", or the name of a task, such as "task-002".
            key: Of a model that you taught; empty for the one that is served.

        Returns:
            What it is and why, as HTML; the five likeliest classes; the distance to the nearest prototype of every
            task; and all of it as JSON.
        """
        if not picture:  # it was taken off the page
            return "", None, gr.skip(), None
        model = self.models.get(key)
        options: dict[str, Any] = {"top_k": max(5, len(model.bank)), **self._reject(model)}
        if expert and expert != NEAREST:
            options["expert"] = expert
        (found,) = self.models.batcher.predict(model, [open_picture(picture)], **options)
        details = asdict(found)
        details["classes"] = dict(list(found.classes.items())[:5])
        return (
            views.verdict(found, model, self.reject_rate, chosen="expert" in options),
            details["classes"],
            views.distance_bars(found, model),
            details,
        )

    @friendly
    def scan_drawing(self, drawing: bytes | str | None) -> PIL.Image.Image:
        """Scan a drawn digit down as the digits of the training data were.

        Args:
            drawing: Dark strokes on a light ground.

        Returns:
            The picture, for /predict.
        """
        if not drawing:
            raise VisitorError("There is nothing on the canvas yet: draw a digit first.")
        return scan(open_picture(drawing, "the drawing"))

    def _reject(self, model: ContinualModel) -> dict:
        return {"reject_rate": self.reject_rate} if model.can_reject else {}

    # Many pictures

    @friendly
    def predict_files(self, files: list[str] | None, key: str | None = "") -> tuple[pd.DataFrame, str]:
        """Classify many pictures at once, each by its own expert, all in shared batches.

        Args:
            files: Pictures, or zip archives of pictures; 500 at most.
            key: Of a model that you taught; empty for the one that is served.

        Returns:
            A table with one row for each picture, and the same as a CSV file.
        """
        if not files:
            raise VisitorError("There is no file yet: add pictures or a zip archive of pictures.")
        model = self.models.get(key)
        rows: list[list] = []
        waiting: list[list] = []  # rows whose pictures have been read
        options = self._reject(model)

        def read() -> Iterator[PIL.Image.Image]:
            for name, image in read_uploads(files):
                rows.append([name, "", None, "", None, None, ""])
                if isinstance(image, VisitorError):
                    rows[-1][-1] = str(image)
                else:
                    waiting.append(rows[-1])
                    yield image

        images = read()
        while found := self.models.batcher.predict(model, islice(images, 32), **options):
            for row, answer in zip(waiting, found, strict=True):
                row[1:6] = (
                    answer.label or views.NONE,
                    round(answer.score, 4),
                    answer.expert,
                    round(answer.distance, 4),
                    answer.typicality,
                )
            waiting.clear()
        table = pd.DataFrame(rows, columns=TABLE)
        return table, _keep(table.to_csv(index=False).encode(), "predictions.csv")

    # Look inside

    @friendly
    def look_inside(
        self, step: float, picture: str | None = None, key: str | None = ""
    ) -> tuple[str, str, str, dict | None, dict[str, float] | None]:
        """The model as it was after a task: what it could do, where its prototypes lie, what it would have answered.

        Args:
            step: After how many tasks.
            picture: A picture to answer as of then, and to put on the map; optional.
            key: Of a model that you taught; empty for the one that is served.

        Returns:
            What it had learnt; its accuracy matrix and routing, in percent, as HTML; its prototypes on a plane; its
            answer to the picture.
        """
        now = self.models.get(key)
        step = int(step) if math.isfinite(step) else 0
        model, query, answer = self.models.after(key, step), None, None
        if picture:
            image = open_picture(picture)
            (found,) = self.models.batcher.predict(model, [image], top_k=5, **self._reject(model))
            answer = found.classes if found.label is not None else {views.NONE: 1.0}
            query = self.models.batcher.run(lambda: views.query_of(model, image))
        return (
            views.learnt(now, step),
            views.accuracy_table(now.report, step),
            views.routing_table(now.report),
            views.prototype_points(model, query),
            answer,
        )

    # Teach it

    @friendly
    def teach(
        self,
        name: str | None,
        files: list[str] | None,
        key: str | None = "",
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, str, str]:
        """Teach new classes from a few pictures each: one more task, on a model of your own.

        Args:
            name: Name of the class; empty if the pictures lie in one folder for each class.
            files: Three or more pictures of each class, or a zip archive of folders named after the classes.
            key: Of the model to go on with; empty for the one that is served.

        Returns:
            What happened, as HTML; the key of the new model; and the model as a zip archive.
        """
        known = self.models.get(key).config.classes
        classes = sort_pictures(name or "", read_uploads(files or []), known)
        lesson = teach(self.models, key, classes, self.examples, lambda share, text: progress(share, desc=text))
        progress(0.95, desc="Packing the model")
        archive = shutil.make_archive(str(lesson.folder), "zip", lesson.folder)
        return views.lesson(lesson, classes), lesson.key, archive

    @friendly
    def add_drawing(self, drawing: bytes | str | None, files: list[str] | None) -> list[str]:
        """Put a drawing among the pictures to teach from.

        Args:
            drawing: Dark strokes on a light ground.
            files: The pictures so far.

        Returns:
            The pictures with one more.
        """
        png = io.BytesIO()
        self.scan_drawing(drawing).save(png, "PNG")
        return [*(files or []), _keep(png.getvalue(), f"drawing-{len(files or []) + 1}.png")]

    @friendly
    def push(self, repo_id: str | None, token: str | None, key: str | None) -> str:
        """Push the model that you taught to the Hub, in your name.

        Args:
            repo_id: Where to, such as "me/my-digits"; made if needed.
            token: Your token with write access; used once, stored nowhere.
            key: Of the model that you taught.

        Returns:
            Where it is, as HTML.
        """
        if not key:
            raise VisitorError("Teach a class first; then there is a model to push.")
        repo_id, token = (repo_id or "").strip(), (token or "").strip()
        if not token or not repo_id:
            # Without a token the library would take that of whoever runs this server.
            raise VisitorError("Give the repo's name and your own token with write access.")
        url = self.models.get(key).push_to_hub(repo_id, token=token)
        return views.link(url)


def _keep(content: bytes, name: str) -> str:
    """Puts a file where gradio serves files from, and deletes them after an hour."""
    return save_bytes_to_cache(content, name, get_upload_folder())
