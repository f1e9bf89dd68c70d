"""The pictures that a model carries, decoded with care: they come from whoever made the model."""

import io
from pathlib import Path
from weakref import WeakKeyDictionary

import PIL.Image
import torch

from ..model import ContinualModel
from ..storage.pictures import EXAMPLES, LARGEST_PICTURE, thumbnails_file
from .pictures import VisitorError, open_picture
from .queries import query_of


SHORTEST, LONGEST = 16, 128  # pixels of the side of a thumbnail
MOST_TILES = 32


def tiles(model: ContinualModel, task: str) -> list[PIL.Image.Image]:
    """The thumbnails of a task; none if it has none, or what is there is no strip of squares.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.demo.gallery import tiles

    >>> model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    >>> tiles(model, "task-000")
    []
    >>> model.pictures["thumbnails/task-000.jpg"] = b"no picture"
    >>> tiles(model, "task-000")
    []

    ```
    """
    data = model.pictures.get(thumbnails_file(task), b"")
    try:
        width, side = PIL.Image.open(io.BytesIO(data[:LARGEST_PICTURE]), formats=["JPEG"]).size
        if not SHORTEST <= side <= LONGEST or width % side or not 1 <= width // side <= MOST_TILES:
            return []
        strip = open_picture(data)
    except (VisitorError, OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return []
    return [strip.crop((left, 0, left + side, side)) for left in range(0, width, side)]


def write_examples(model: ContinualModel, folder: Path) -> list[Path]:
    """Writes the example pictures of a model to a folder; what is no picture is left out. Returns their paths."""
    written = []
    for path, content in sorted(model.pictures.items()):
        if path.startswith(f"{EXAMPLES}/"):
            try:
                open_picture(content)
            except VisitorError:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / Path(path).name)
            written[-1].write_bytes(content)
    return written


class Gallery:
    """Finds the training picture nearest to a visitor's. What it has looked at once it knows. Not thread-safe."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[ContinualModel, dict[str, tuple[list, torch.Tensor]]] = WeakKeyDictionary()

    def nearest(self, model: ContinualModel, task: str | None, image: PIL.Image.Image) -> PIL.Image.Image | None:
        """The thumbnail of a task whose query features are nearest to those of a picture, if the task has any."""
        if task is None or thumbnails_file(task) not in model.pictures:
            return None
        known = self._known.setdefault(model, {})
        if task not in known:
            small = tiles(model, task)
            queries = [query_of(model, one) for one in small]
            known[task] = small, torch.nn.functional.normalize(torch.cat(queries), dim=-1) if small else torch.zeros(0)
        small, points = known[task]
        if not small:
            return None
        query = torch.nn.functional.normalize(query_of(model, image), dim=-1)
        return small[int(torch.cdist(query, points).argmin())]
