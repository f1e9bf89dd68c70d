"""The endpoints of the page and its API, one method each."""

import csv
import functools
import html
import inspect
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

import gradio as gr
import PIL.Image
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from ..config.checks import fits
from ..config.errors import HfClpeftError
from ..config.text import csv_text
from ..model import ContinualModel
from ..prediction import Prediction
from . import views
from .charts import thumbnail
from .drawing import scan
from .gallery import tiles
from .gpu import on_gpu
from .models import Models
from .pictures import VisitorError, open_picture, read_uploads
from .queries import query_of
from .returning import pack, take_back
from .saliency import overlay, saliency
from .teaching import sort_pictures, teach


DRAWING = "drawing.png"  # a name by which drawings are known
COMPARED = 3  # experts
SHOWN = 3  # thumbnails of a task, in a list of tasks
P = ParamSpec("P")
R = TypeVar("R")
TABLE = ["picture", "answer", "score", "expert", "distance", "typicality", "problem"]


def friendly(method: Callable[Concatenate["Handlers", P], R]) -> Callable[Concatenate["Handlers", P], R]:
    """Validates argument types, and shows errors of the library to the visitor: no traceback or path of the server."""
    signature, hints = inspect.signature(method), get_type_hints(method)

    @functools.wraps(method)
    def wrapper(handlers: "Handlers", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            for name, value in signature.bind(handlers, *args, **kwargs).arguments.items():
                if name in hints and not fits(value, hints[name]):
                    wanted = getattr(hints[name], "__name__", hints[name])
                    raise VisitorError(f"{name} must be of type {wanted}, and not {type(value).__name__}.")
            return method(handlers, *args, **kwargs)
        except HfClpeftError as error:
            # Rendered as HTML, and may contain untrusted file names.
            said = handlers.models.without_paths(str(error))
            raise gr.Error(html.escape(said, quote=False), print_exception=False) from None

    return wrapper


class Handlers:
    """The endpoints of one [`Models`].

    Args:
        models ([`Models`]): The models to serve.
        examples (sequence of `Path`): Pictures whose predictions are compared before and after teaching.
        reject_rate (`float`, *optional*): See [`ContinualModel.predict`]; ignored by models that cannot reject.
    """

    def __init__(self, models: Models, examples: Sequence[Path] = (), reject_rate: float = 0.05):
        self.models = models
        self.examples = [open_picture(path) for path in examples]
        self.reject_rate = reject_rate

    # Try it

    @on_gpu
    @friendly
    def predict(
        self, picture: str | None, key: str | None = ""
    ) -> tuple[str, dict[str, float] | None, str, dict | None]:
        """Classify one picture. Its expert is the one with the nearest prototype.

        Args:
            picture: The picture: PNG, JPEG, WebP, GIF, BMP or TIFF.
            key: Key of a model that you taught; empty for the served one.

        Returns:
            The prediction and its route, as HTML; the five likeliest classes, if it was recognised; the distance to
            the nearest prototype of every task, as HTML; and all of it as JSON.
        """
        if not picture:  # the visitor removed it
            return "", None, "", None
        model, image = self.models.get(key), open_picture(picture)
        # Drawings are never quite like scans, and are refused far too often.
        reject = {} if Path(picture).name == DRAWING else self._reject(model)
        options: dict[str, Any] = {"top_k": max(5, len(model.bank)), **reject}
        (found,) = self.models.batcher.predict(model, [image], **options)
        details = asdict(found)
        details["classes"] = dict(list(found.classes.items())[:5])
        likeliest = {name: score for name, score in details["classes"].items() if score >= views.SHOWN}
        like = self.models.batcher.run(lambda: self.models.gallery.nearest(model, found.expert, image))
        return (
            views.verdict(found, model, self.reject_rate, image, like),
            None if found.label is None else likeliest,
            views.distance_bars(found, model),
            details,
        )

    @on_gpu
    @friendly
    def explain(self, picture: str | None, key: str | None = "") -> tuple[str, list | None]:
        """Show where in a picture the model looks: which parts count most for its answer.

        Args:
            picture: The picture: PNG, JPEG, WebP, GIF, BMP or TIFF.
            key: Key of a model that you taught; empty for the served one.

        Returns:
            The picture with a heat map over it, as HTML; and the heat map, 16 rows of 16 shares that sum up to 1.
        """
        if not picture:
            raise VisitorError("Give a picture first.")
        model, image = self.models.get(key), open_picture(picture)
        heat = self.models.batcher.run(lambda: saliency(model, image))
        return overlay(image, heat), heat.round(5).tolist()

    @on_gpu
    @friendly
    def compare_experts(self, picture: str | None, key: str | None = "") -> tuple[str, dict | None]:
        """What each of the three nearest experts says of a picture.

        Args:
            picture: The picture.
            key: Key of a model that you taught; empty for the served one.

        Returns:
            Their answers side by side, as HTML; and as JSON, by the name of the expert.
        """
        model = self.models.get(key)
        if not picture or not views.has_choice(model):
            return "", None
        image = open_picture(picture)
        (found,) = self.models.batcher.predict(model, [image], top_k=COMPARED)
        ask = functools.partial(self.models.batcher.predict, model, [image], top_k=2)
        answers = {name: ask(expert=name)[0] for name in found.experts}
        said = {name: {"label": one.label, "score": one.score} for name, one in answers.items()}
        return views.comparison(answers, model), said

    @friendly
    def scan_drawing(self, drawing: bytes | str | None) -> str:
        """Downsample a drawn digit like the digits of the training data.

        Args:
            drawing: Dark strokes on a light background.

        Returns:
            The picture, for /predict.
        """
        if not drawing:
            raise VisitorError("There is nothing on the canvas yet: draw a digit first.")
        return keep(_png(scan(open_picture(drawing, "the drawing"))), DRAWING)

    def _reject(self, model: ContinualModel) -> dict:
        return {"reject_rate": self.reject_rate} if model.can_reject else {}

    # Many pictures

    @on_gpu
    @friendly
    def predict_files(self, files: list[str] | None, key: str | None = "") -> tuple[str, str]:
        """Classify many pictures, each routed to its own expert, in shared batches.

        Args:
            files: Pictures, or zip archives of pictures; 500 at most.
            key: Key of a model that you taught; empty for the served one.

        Returns:
            A table with one row per picture, as HTML; and the same as a CSV file.
        """
        if not files:
            raise VisitorError("Add pictures, or a zip archive of pictures, first.")
        model = self.models.get(key)
        rows: list[list] = []  # name, thumbnail, prediction or problem
        options = {"top_k": 2, **self._reject(model)}
        waiting: list[list] = []  # rows whose pictures are being classified

        def read() -> Iterator[PIL.Image.Image]:
            for name, image in read_uploads(files):
                if isinstance(image, VisitorError):
                    rows.append([name, None, image])
                else:
                    rows.append([name, thumbnail(image), None])
                    waiting.append(rows[-1])
                    yield image

        images = read()
        while found := self.models.batcher.predict(model, islice(images, 32), **options):
            for row, answer in zip(waiting, found, strict=True):
                row[2] = answer
            waiting.clear()
        sheet = io.StringIO(newline="")
        csv.writer(sheet).writerows([TABLE, *(_cells(name, found) for name, _, found in rows)])
        return views.file_table(rows, model), keep(sheet.getvalue().encode(), "predictions.csv")

    # Look inside

    @on_gpu
    @friendly
    def look_inside(
        self, step: float, picture: str | None = None, key: str | None = ""
    ) -> tuple[str, str, str, str | None, str]:
        """The model as it was after a task: its accuracy, its prototypes, and its prediction for a picture.

        Args:
            step: Number of tasks learnt.
            picture: A picture to classify with that model, and to add to the map; optional.
            key: Key of a model that you taught; empty for the served one.

        Returns:
            As HTML: its tasks; its accuracy matrix and its routing, in percent; a map of its prototypes; and its
            prediction for the picture.
        """
        now = self.models.get(key)
        step = int(step) if math.isfinite(step) else 0
        model, query, answer = self.models.after(key, step), None, ""
        if picture:
            image = open_picture(picture)
            (found,) = self.models.batcher.predict(model, [image], top_k=2, **self._reject(model))
            answer = views.answer(found, model)
            query = self.models.batcher.run(lambda: query_of(model, image))
        return (
            views.learnt(now, step, {task.name: tiles(now, task.name)[:SHOWN] for task in now.config.tasks}),
            views.accuracy_table(now, step),
            views.routing_table(now, step),
            views.point_map(now, model, query),
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
        """Teach new classes from a few pictures each: one more task, on your own copy of the model.

        Args:
            name: Name of the class; empty if there is one folder of pictures per class.
            files: Three or more pictures of each class, or a zip archive of folders named after the classes.
            key: Key of the model to continue; empty for the served one, which also takes the place of one that is
                not there any more.

        Returns:
            A summary, as HTML; the key of the new model; and the model as a zip archive.
        """
        lost = bool(key) and not self.models.has(key)
        key = "" if lost else key
        known = self.models.get(key).config.classes
        classes, left_out = sort_pictures(name or "", read_uploads(files or []), known)
        lesson = teach(
            self.models, key, classes, self.examples, self.reject_rate, lambda share, text: progress(share, desc=text)
        )
        progress(0.95, desc="Packing the model")
        said = views.lesson(lesson, classes, self.models.get(lesson.key), left_out)
        return said + views.LOST * lost, lesson.key, self._archive(lesson.folder)

    def _archive(self, folder: Path) -> str:
        """A taught model as a zip archive, which is made once."""
        made = Path(f"{folder}.zip")
        return str(made) if made.exists() else pack(folder)

    @friendly
    def add_drawing(self, drawing: bytes | str | None, files: list[str] | None) -> list[str]:
        """Add a drawing to the pictures to teach from.

        Args:
            drawing: Dark strokes on a light background.
            files: The pictures so far.

        Returns:
            The pictures with the drawing.
        """
        drawn = Path(self.scan_drawing(drawing)).read_bytes()
        return [*(files or []), keep(drawn, f"drawing-{len(files or []) + 1}.png")]

    @friendly
    def give_back(self, archive: str | None) -> tuple[str, str]:
        """Give back a model that you taught and downloaded, to go on with it.

        Args:
            archive: The downloaded zip archive.

        Returns:
            What it is, as HTML; and its key.
        """
        if not archive:
            raise VisitorError("Choose the archive that you downloaded here.")
        key = take_back(self.models, archive)
        return views.own_model(self.models.get(key)), key

    @friendly
    def recall(self, key: str | None) -> tuple[str, str, gr.File]:
        """A visitor's own model after a reload: the words for it, its key, and its archive."""
        if not key or not self.models.has(key):  # it was evicted, or the server started again
            return views.GONE if key else "", "", gr.File(None, visible=False)
        folder = self.models.folder(key)
        assert folder is not None
        return views.own_model(self.models.get(key)), key, gr.File(self._archive(folder), visible=True)

    @friendly
    def push(self, repo_id: str | None, token: str | None, key: str | None) -> str:
        """Push the model that you taught to the Hub, with your own token.

        Args:
            repo_id: Repo id, such as "me/my-digits"; created if missing.
            token: Your token with write access; used once, never stored.
            key: Key of the model that you taught.

        Returns:
            A link to the repo, as HTML.
        """
        if not key:
            raise VisitorError("Teach a class first; then there is a model to push.")
        repo_id, token = (repo_id or "").strip(), (token or "").strip()
        if not token or not repo_id:
            # Without a token, the library would use that of the server's operator.
            raise VisitorError("Give the repo's name and your own token with write access.")
        url = self.models.get(key).push_to_hub(repo_id, token=token)
        return views.link(url)


def _png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _cells(name: str, found: Prediction | VisitorError) -> list:
    """A row of the CSV file."""
    if isinstance(found, VisitorError):
        return [csv_text(name), "", "", "", "", "", csv_text(str(found))]
    label, expert = csv_text(views.NONE if found.label is None else found.label), csv_text(found.expert or "")
    return [csv_text(name), label, round(found.score, 4), expert, round(found.distance, 4), found.typicality, ""]


def keep(content: bytes, name: str) -> str:
    """Saves a file to gradio's cache, which is served, and deleted after an hour.

    It is moved there, as another visitor may be reading the same file just then.
    """
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        saved = Path(save_bytes_to_cache(content, name, staging))
        place = folder / saved.relative_to(Path(staging).resolve())
        place.parent.mkdir(exist_ok=True)
        saved.replace(place)
    return str(place)
