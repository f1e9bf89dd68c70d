"""Renders predictions and models as HTML, tables and plots."""

from collections import Counter
from collections.abc import Sequence
from html import escape

import numpy as np
import PIL.Image
import torch

from ..config.text import percent
from ..model import ContinualModel
from ..prediction import Prediction
from ..reports.card import describe
from ..reports.report import StreamReport
from .teaching import Lesson


NONE = "none of my tasks"
PICTURE = "your picture"
PALETTE = ("#3b82f6", "#f59e0b", "#10b981", "#8b5cf6", "#06b6d4", "#84cc16", "#d946ef", "#a16207", "#64748b")


def introduction(model: ContinualModel, source: str) -> str:
    """The header of the page, as HTML."""
    config, experts = model.config, describe(model.config.method)["experts"]
    return (
        '<div id="intro"><h1>Which expert takes your picture?</h1>'
        f"<p>A frozen vision transformer has learnt {len(config.classes)} classes in {len(config.tasks)} tasks, one "
        f"after another, with {escape(config.method.name)}: {escape(experts)}. <code>{escape(source)}</code></p></div>"
    )


def colours(model: ContinualModel) -> dict[str, str]:
    """A colour per expert for its prototypes, and another one for the visitor's picture."""
    names = titles(model).values()
    return {**{name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}, PICTURE: "#ef4444"}


def titles(model: ContinualModel) -> dict[str, str]:
    """A unique title per expert: its task's domain or classes, or its name in a pool. Per task, where none reads."""
    named = {task.name: task.title for task in model.config.tasks}
    titles = {name: named.get(name, name) for name in (model.bank.names if model.method.reads else named)}
    count = Counter(titles.values())
    taken, unique = {PICTURE}, {}
    for name, title in titles.items():
        while title in taken or count[title] > 1:
            title += f" ({name})"
        unique[name] = title
        taken.add(title)
    return unique


def verdict(prediction: Prediction, model: ContinualModel, reject_rate: float, chosen: bool = False) -> str:
    """The prediction and its routing in a few sentences, as HTML.

    Args:
        prediction ([`Prediction`]): Including the distances of all experts.
        model ([`ContinualModel`]): The model that made it.
        reject_rate (`float`): As passed to [`ContinualModel.predict`].
        chosen (`bool`, *optional*, defaults to `False`): Whether the visitor chose the expert.

    Returns:
        `str`: HTML, with untrusted names escaped.
    """
    label = escape(prediction.label if prediction.label is not None else NONE)
    score = "" if prediction.label is None else f"<small>{percent(prediction.score, 0)}</small>"
    sentences = _route(prediction, model, chosen) if model.method.routes and prediction.experts else []
    if prediction.typicality is not None:
        share = percent(prediction.typicality, 0) if prediction.typicality else "Under 1 %"
        landmarks = "prototypes" if model.router is None or model.router.landmark == "prototype" else "classes"
        sentences.append(f"{share} of a task's own pictures are at least as far from its {landmarks} as this one.")
    if prediction.label is None:
        sentences.append(
            f"That is less than {percent(reject_rate, 0)}, so it is rejected as out-of-distribution; the likeliest "
            f"class would have been {escape(next(iter(prediction.classes)))}."
        )
    return f'<div class="verdict"><b>{label}</b> {score}</div><p>{" ".join(sentences)}</p>'


def _route(prediction: Prediction, model: ContinualModel, chosen: bool) -> list[str]:
    """Who classified a picture, and how clear that was."""
    method, router, names = model.method, model.router, titles(model)
    nearest, *others = prediction.experts.items()
    if method.num_selected > 1 and not chosen:
        selected = [f"<b>{escape(names[name])}</b>" for name in list(prediction.experts)[: method.num_selected]]
        also = "the router and " if router is not None and router.knows_classes else ""
        of_tasks = "" if method.expert_of(0) is None else "of "
        return [f"Classified by {also}the experts {of_tasks}{', '.join(selected)} together."]
    assert prediction.expert is not None
    sentences = [f"Classified by the expert of <b>{escape(names[prediction.expert])}</b>."]
    if chosen and nearest[0] != prediction.expert:
        sentences.append(f"Routing alone would have chosen {escape(names[nearest[0]])}.")
    elif router is not None and others and others[0][1] > 0:
        margin = 1 - nearest[1] / others[0][1]
        sure = "clear" if margin >= 0.2 else "a close call" if margin < 0.05 else "fairly clear"
        sentences.append(
            f"The route is {sure}: the nearest {router.landmark} is {percent(margin, 0)} nearer than any other task's."
        )
    return sentences


def distance_bars(prediction: Prediction, model: ContinualModel) -> dict:
    """Data of a bar plot: experts in the order learnt, their distances, and whether they were chosen."""
    names = titles(model)
    rows = [
        [names[name], prediction.experts[name], "chosen" if name == prediction.expert else "others"]
        for name in model.bank.names
        if name in prediction.experts
    ]
    return _plot({"expert": "nominal", "distance": "quantitative", "part": "nominal"}, rows, "bar")


def _plot(columns: dict[str, str], rows: list[list], mark: str) -> dict:
    """Plot data as gradio makes it of a pandas frame; pandas would take longer than the model."""
    return {"columns": list(columns), "data": rows, "datatypes": columns, "mark": mark}


def heat_table(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], corner: str) -> str:
    """A heat map of values in [0, 1] as an HTML table.

    Args:
        values (array of shape `(rows, columns)`): In [0, 1]; NaN leaves a cell empty.
        rows (sequence of `str`): Titles of the rows.
        columns (sequence of `str`): Titles of the columns.
        corner (`str`): What rows and columns are, for the top left cell.

    Returns:
        `str`: HTML, with titles escaped.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.demo.views import heat_table

    >>> "<td style='--v:75'>75</td>" in heat_table(np.array([[0.75]]), ["<b>"], ["cats"], "after")
    True

    ```
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in columns)
    body = "".join(
        f"<tr><th>{escape(text)}</th>"
        + "".join("<td></td>" if np.isnan(v) else f"<td style='--v:{100 * v:.0f}'>{100 * v:.0f}</td>" for v in row)
        + "</tr>"
        for text, row in zip(rows, values, strict=True)
    )
    return f'<div class="heat"><table><tr><th>{escape(corner)}</th>{head}</tr>{body}</table></div>'


def accuracy_table(report: StreamReport | None, step: int) -> str:
    """The accuracy matrix up to a task, as HTML."""
    if report is None or not report.tasks:
        return "<p>No accuracy was measured while this model was trained.</p>"
    matrix = np.array(report.accuracy_matrix, dtype=float)[:step, :step]
    return heat_table(matrix, report.titles[:step], report.titles[:step], "after \\ on, %")


def routing_table(report: StreamReport | None) -> str:
    """The routing confusion after the last measured task, as HTML."""
    if report is None or not np.any(report.routing_confusion):
        return "<p>Routing was not measured for this model.</p>"
    confusion = np.array(report.routing_confusion, dtype=float)
    sums = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, sums, out=np.full_like(confusion, np.nan), where=sums > 0)
    return heat_table(share, report.titles, report.experts, "of \\ to, %")


def prototype_points(model: ContinualModel, query: torch.Tensor | None = None) -> dict | None:
    """Prototypes and a picture's query features, projected on the first two principal components.

    Args:
        model ([`ContinualModel`]): The model.
        query (`torch.Tensor` of shape `(1, hidden_size)`, *optional*): Query features of the picture.

    Returns:
        `dict`: Data of a scatter plot; `None` for fewer than two points, or without a router of the titled experts.
    """
    if model.router is None:
        return None
    names, (vectors, numbers) = list(titles(model).values()), model.router.points()
    if len(vectors) < 2 or int(numbers.max()) >= len(names):
        return None
    owners = [names[number] for number in numbers.tolist()]
    points = vectors.detach().float().cpu().numpy()
    centre = points.mean(axis=0)
    _, _, axes = np.linalg.svd(points - centre, full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2].sum(axis=1, keepdims=True))  # so that a new point cannot flip the plot
    if query is not None:
        points = np.concatenate([points, torch.nn.functional.normalize(query, dim=-1).float().cpu().numpy()])
        owners = [*owners, PICTURE]
    plane = (points - centre) @ axes.T
    rows = [[float(x), float(y), owner] for (x, y), owner in zip(plane, owners, strict=True)]
    return _plot({"x": "quantitative", "y": "quantitative", "prototypes of": "nominal"}, rows, "point")


def query_of(model: ContinualModel, image: PIL.Image.Image) -> torch.Tensor:
    """Query features of one picture, of shape `(1, query_size)`; of several views the first."""
    pixels = torch.from_numpy(model.backbone.transform.resize([image])).to(model.device)
    with torch.no_grad():
        query = model.method.query(model.backbone.transform.normalize(pixels))
    return query if query.dim() == 2 else query[:, 0]


def learnt(model: ContinualModel, step: int) -> str:
    """The tasks that a model had learnt after `step` tasks, as HTML."""
    tasks = model.config.tasks
    items = "".join(
        f"<li{'' if i < step else ' class=later'}><b>{escape(task.name)}</b> {escape(task.title)}"
        f"{f' · {task.num_train_images} pictures' if task.num_train_images else ''}</li>"
        for i, task in enumerate(tasks)
    )
    return f'<p>After task {step} of {len(tasks)}:</p><ol class="tasks">{items}</ol>'


def lesson(found: Lesson, classes: dict[str, list]) -> str:
    """The result of teaching, as HTML."""
    names = ", ".join(f"<b>{escape(label)}</b> ({len(pictures)} pictures)" for label, pictures in classes.items())
    text = f"<p>Learnt {names} as {found.task} in {found.seconds:.0f} seconds. "
    text += "Old experts, prototypes and head rows are bit-identical. "
    if found.answers:
        text += f"{found.unchanged} of {found.answers} answers to the example pictures are bit-identical, too. "
    return text + "From now on you use your own model, which no other visitor sees.</p>"


def link(url: str) -> str:
    """A link to the Hub, as HTML."""
    return f'<p>Pushed: <a href="{escape(url)}" target="_blank" rel="noopener">{escape(url)}</a></p>'
