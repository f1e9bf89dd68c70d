"""Charts as HTML and SVG: they fit any screen and both themes, and a screen reader reads their numbers."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import PIL.Image

from .names import Name


PALETTE = ("#2563eb", "#b45309", "#047857", "#7c3aed", "#0e7490", "#4d7c0f", "#a21caf", "#854d0e", "#475569")
THUMBNAIL = 48  # pixels
WIDTH, HEIGHT, EDGE = 400, 300, 18  # of a map, in units of which it has as many on every screen
FEW = 7  # columns of a heat map that fit a phone at full size
MANY = 200  # points on a map, beyond which they are small


def bars(rows: Sequence[tuple[Name, float]], chosen: Sequence[int], what: str, mark: str = "chosen") -> str:
    """Horizontal bars with their values, as an HTML list.

    Args:
        rows (sequence of `(Name, float)`): One bar each, from top to bottom.
        chosen (sequence of `int`): Rows to stress.
        what (`str`): What is shown, for screen readers.
        mark (`str`, *optional*): The word for a stressed row.

    Returns:
        `str`: HTML, with names escaped.

    Example:

    ```py
    >>> from hf_clpeft.demo.charts import bars
    >>> from hf_clpeft.demo.names import Name

    >>> html = bars([(Name("Task 1", "cat", "cat"), 0.5), (Name("Task 2", "dog", "dog"), 1.0)], [0], "Distances")
    >>> html.count("<li"), "--v:50.0" in html
    (2, True)

    ```
    """
    values = [value for _, value in rows]
    low = min([0.0, *values])
    span = max([value - low for value in values], default=0.0) or 1.0
    items = "".join(
        f"<li{' class=chosen' if i in chosen else ''}><span class=who>{name.html()}</span>"
        f"<span class=bar style='--v:{100 * (value - low) / span:.1f}' aria-hidden=true></span>"
        f"<span class=value>{value:.3g}{f' <em>{escape(mark)}</em>' if i in chosen else ''}</span></li>"
        for i, (name, value) in enumerate(rows)
    )
    return f'<ol class="bars" aria-label="{escape(what)}" tabindex=0>{items}</ol>' if rows else ""


def heat_table(values: np.ndarray, rows: Sequence[Name], columns: Sequence[Name], corner: str) -> str:
    """A heat map of values in [0, 1] as an HTML table, that scrolls sideways beside its first column.

    Args:
        values (array of shape `(rows, columns)`): In [0, 1]; NaN leaves a cell empty.
        rows (sequence of [`Name`]): Titles of the rows.
        columns (sequence of [`Name`]): Titles of the columns, of which only the short form is shown.
        corner (`str`): What rows and columns are, for the top left cell.

    Returns:
        `str`: HTML, with titles escaped.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.demo.charts import heat_table
    >>> from hf_clpeft.demo.names import Name

    >>> "<td style='--v:75'>75</td>" in heat_table(np.array([[0.75]]), [Name("a", "", "")], [Name("b", "", "")], "")
    True

    ```
    """
    head = "".join(
        f'<th scope=col title="{escape(str(name))}">{escape(name.short.removeprefix("Task "))}</th>'
        for name in columns
    )
    body = "".join(
        f"<tr><th scope=row>{name.html()}</th>"
        + "".join("<td></td>" if np.isnan(v) else f"<td style='--v:{100 * v:.0f}'>{100 * v:.0f}</td>" for v in row)
        + "</tr>"
        for name, row in zip(rows, values, strict=True)
    )
    kind = f'class="heat{" many" if len(columns) > FEW else ""}" style="--n:{len(columns)}"'
    where = f'{kind} role=region tabindex=0 aria-label="{escape(corner)}"'
    return f"<div {where}><table><tr><th scope=col class=corner>{escape(corner)}</th>{head}</tr>{body}</table></div>"


class Plane(NamedTuple):
    """The plane in which points spread most.

    Args:
        centre (array of shape `(size,)`): Mean of the points.
        axes (array of shape `(2, size)`): Their first two principal components.
        low, high (array of shape `(2,)`): Between these lie the points on it.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.demo.charts import Plane

    >>> plane = Plane.of(np.array([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [2.0, 1.0, 0.0]]))
    >>> plane.project(np.array([[2.0, 0.0, 9.0]])).shape
    (1, 2)

    ```
    """

    centre: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, points: np.ndarray) -> "Plane":
        """Fits the plane to two points or more."""
        centre = points.mean(axis=0)
        _, _, axes = np.linalg.svd(points - centre, full_matrices=False)
        axes = axes[:2] * np.where(axes[:2].sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
        on_it = (points - centre) @ axes.T
        return cls(centre, axes, on_it.min(axis=0), on_it.max(axis=0))

    def project(self, points: np.ndarray) -> np.ndarray:
        """Places of points on the plane, `(points, 2)`."""
        return (points - self.centre) @ self.axes.T


def map_of(plane: Plane, points: np.ndarray, owners: np.ndarray, names: Sequence[Name], query: np.ndarray) -> str:
    """A map of points, each drawn as the number of its task, and of the visitor's picture.

    Args:
        plane ([`Plane`]): Where they are projected to.
        points (array of shape `(points, size)`): The points.
        owners (integer array of shape `(points,)`): Index of the name of each.
        names (sequence of [`Name`]): Tasks or experts.
        query (array of shape `(pictures, size)`): The visitor's picture, or none.

    Returns:
        `str`: SVG in HTML, with names escaped.
    """
    places, picture = plane.project(points), plane.project(query)
    low, high = plane.low, plane.high
    if len(picture):  # it may lie beside all points
        low, high = np.minimum(low, picture[0]), np.maximum(high, picture[0])
    scale = (np.array([WIDTH, HEIGHT]) - 2 * EDGE) / np.maximum(high - low, 1e-9)

    def at(place: np.ndarray) -> tuple[float, float]:
        x, y = EDGE + (place - low) * scale
        return round(float(x), 1), round(HEIGHT - float(y), 1)

    marks = []
    for place, owner in zip(places, owners.tolist(), strict=True):
        (x, y), colour = at(place), PALETTE[owner % len(PALETTE)]
        marks.append(
            f'<g style="--c:{colour}"><title>{escape(str(names[owner]))}</title>'
            f'<circle cx="{x}" cy="{y}" r="{4 if len(points) > MANY else 7}"/>'
            + (f'<text x="{x}" y="{y}">{owner + 1}</text></g>' if len(points) <= MANY else "</g>")
        )
    said = f"{len(points)} points, each with the number of its {'task' if names[0].about else 'expert'}."
    yours = ""
    if len(query):
        nearest = int(np.argmin(np.linalg.norm(points - query[0], axis=1)))
        (x, y), (to_x, to_y) = at(picture[0]), at(places[nearest])
        marks.append(
            f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}"/>'
            f'<text class=star x="{x}" y="{y}"><title>Your picture</title>★</text>'
        )
        yours = f"Your picture is nearest to {names[int(owners[nearest])]}."
    return (
        f'<svg class="map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{said} {yours}".strip())}">'
        f"{''.join(marks)}</svg><p>{escape(said)}{f' <b class=yours>★</b> {escape(yours)}' if yours else ''}</p>"
    )


def thumbnail(image: PIL.Image.Image, size: int = THUMBNAIL) -> str:
    """A small copy of a picture, as a `data:` address.

    Example:

    ```py
    >>> from PIL import Image
    >>> from hf_clpeft.demo.charts import thumbnail

    >>> thumbnail(Image.new("RGB", (800, 600)))[:22]
    'data:image/jpeg;base64'

    ```
    """
    small = image.convert("RGB")
    small.thumbnail((size, size), PIL.Image.Resampling.BOX)
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
