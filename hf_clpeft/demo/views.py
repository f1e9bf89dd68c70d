"""Renders predictions and models as HTML."""

from collections.abc import Sequence
from html import escape
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..config.errors import ConfigError
from ..config.text import percent
from ..methods.closed_form import ClosedForm
from ..model import ContinualModel
from ..prediction import Prediction
from ..reports.card import describe
from ..reports.report import margin_bins
from .charts import Plane, bars, heat_table, map_of, thumbnail
from .names import Name, bdi, expert_names, task_names
from .pictures import VisitorError
from .teaching import FEWEST, Lesson, different


NONE = "Not recognised"
UNSURE, LIKELY = 0.5, 0.8  # below these confidences, words say so
WELL = 0.8  # share of a lesson's own pictures, below which it has not succeeded
ADVICE = (
    "More pictures help, above all from other sides and in other light; or other classes beside it, each in a folder "
    "of a zip archive, so that they are weighed against each other."
)
SLDA_PP = (
    " A model of <code>slda_pp</code> learns more from few pictures: after lessons of five photos it recognised "
    "92.5 % of new ones, and one of <code>s_lora</code> 87.9 %."
)
AGAIN = "To try again, press <b>Forget what I taught</b>, and teach it with more."
LEARNT = "Learnt"  # the first word of a lesson that has gone well
LOST = "<p>What you taught before is not here any more, so this lesson began with the original model.</p>"
GONE = "<p>The model that you taught is not here any more: upload its download, or teach it again.</p>"
SHOWN = 0.005  # least score of a class among the likeliest, which are shown without decimals
TYPICAL = 0.2  # least p-value of what is called typical
NAMED = 45  # letters of the classes that the introduction names
OWN = "From now on you use your own model, which no other visitor sees, also after this page is reloaded."
CLEAR = ("a close call", "fairly clear", "clear")
FEWEST_MEASURED = 20  # test pictures that a measured share needs


def introduction(model: ContinualModel, source: str, taught: bool = False) -> str:
    """The header of the page, as HTML; of a folder, visitors see the name alone.

    Args:
        model ([`ContinualModel`]): The model.
        source (`str`): Repo id or folder of the served model.
        taught (`bool`, *optional*, defaults to `False`): Whether it is a visitor's own.

    Returns:
        `str`: HTML, with untrusted names escaped.
    """
    config, experts = model.config, describe(model.config.method)["experts"]
    title, see = "What is in your picture?", "what it is, and how sure the model can be"
    if model.method.routes:
        title, see = "Which expert takes your picture?", "who takes it, and what it is"
    name = Path(source).resolve().name if Path(source).is_dir() else source
    return (
        f"<h1>{title}</h1><p>This model recognises {len(config.classes)} things: {_things(config.classes, taught)} "
        f"<b>Give it a picture</b>, and see {see}.</p>"
        f"<p><small><code>{bdi(name)}</code>: a frozen vision transformer that has learnt "
        f"{len(config.tasks)} tasks, one after another, with {bdi(config.method.name)}: {escape(experts)}.</small></p>"
    )


def _things(classes: Sequence[str], taught: bool) -> str:
    """The first classes of a model, and the last one that a visitor has taught, as HTML."""
    known = classes[:-1] if taught else classes
    named = [name for i, name in enumerate(known) if sum(map(len, known[: i + 1])) <= NAMED] or [known[0][:NAMED]]
    text, all_named = ", ".join(map(bdi, named)), list(known) == named
    if taught:
        return f"{text}{'' if all_named else ', …'} and {bdi(classes[-1])}, which you taught."
    return f"{text}{'.' if all_named else ', …'}"


def verdict(
    prediction: Prediction,
    model: ContinualModel,
    reject_rate: float,
    image: PIL.Image.Image | None = None,
    like: PIL.Image.Image | None = None,
) -> str:
    """The prediction, the route that led to it, and how far to trust both, as HTML.

    Args:
        prediction ([`Prediction`]): Including the distances of all experts.
        model ([`ContinualModel`]): The model that made it.
        reject_rate (`float`): As passed to [`ContinualModel.predict`].
        image (`PIL.Image.Image`, *optional*): The picture, to be drawn where its route begins.
        like (`PIL.Image.Image`, *optional*): The training picture that is nearest to it, to be drawn beside it.

    Returns:
        `str`: HTML, with untrusted names escaped.
    """
    sentences = _route(prediction, model) if model.method.routes and prediction.experts else []
    if prediction.typicality is not None:
        sentences.append(_typical(prediction.typicality))
    if prediction.label is None:
        sentences.append(
            f"As these are fewer than {round(100 * reject_rate)}, no answer is given; the likeliest class would have "
            f"been {bdi(next(iter(prediction.classes)))}."
        )
        answer = f"<b>{NONE}</b> <small>unlike anything learnt</small>"
    else:
        answer = f"<b>{bdi(prediction.label)}</b> <small>{_confidence(prediction, model)}</small>"
        sentences += _measured(prediction, model)
    strip = _strip(prediction, model, image, like)
    return f'<div class="verdict">{answer}</div>{strip}<p>{" ".join(sentences)}</p>'


def _typical(p_value: float) -> str:
    """A conformal p-value in words."""
    how = "typical" if p_value >= TYPICAL else "unusual"
    count = round(100 * p_value)
    many = "all" if count == 100 else f"about {count}" if count else "fewer than 1"
    return (
        f"It looks {how}: of 100 pictures like those it learnt, {many} would lie as far away as this one, or farther."
    )


def _alone(prediction: Prediction, model: ContinualModel) -> bool:
    """Whether an expert that knows a single class has given it, without anything to weigh it against."""
    tasks = {task.name: task for task in model.config.tasks}
    if prediction.expert not in tasks or model.method.num_selected > 1 or model.method.heads is None:
        return False
    return len(model.config.classes) > len(tasks[prediction.expert].classes) == 1


def _confidence(prediction: Prediction, model: ContinualModel) -> str:
    if _alone(prediction, model):
        return "the only class of its task"
    sure, measured = prediction.score, _right_before(prediction, model)
    if measured is not None and not _is_calibrated(model):
        sure = measured[1]
    number = percent(sure, 0)
    if sure >= LIKELY:
        return number
    if sure >= UNSURE or len(prediction.classes) < 2:
        return f"{number}, probably"
    return f"{number}, unsure: perhaps {bdi(list(prediction.classes)[1])}"


def _is_calibrated(model: ContinualModel) -> bool:
    return model.method.temperature() is not None


def _right_before(prediction: Prediction, model: ContinualModel) -> tuple[int, float] | None:
    """The number of test pictures that were answered as surely, and the share of right answers, if it was measured."""
    report = model.report
    if report is None or not report.reliability or _alone(prediction, model):
        return None
    place = min(max(ceil(prediction.score * len(report.reliability)), 1), len(report.reliability)) - 1
    count, _, right = report.reliability[place]
    return None if count < FEWEST_MEASURED else (round(count), right / count)


def _measured(prediction: Prediction, model: ContinualModel) -> list[str]:
    """How often answers as sure as this one were right on test pictures, if that was measured."""
    found = _right_before(prediction, model)
    if found is None:
        return []
    said = f"Of {found[0]} test pictures answered about as surely, {percent(found[1], 0)} were answered right"
    if _is_calibrated(model):
        return [f"{said}."]
    return [f"{said}; the model's own score, {percent(prediction.score, 0)}, is not calibrated."]


def _route(prediction: Prediction, model: ContinualModel) -> list[str]:
    """Who classified a picture, how clear that was, and how often that expert was the right one."""
    method, router, names = model.method, model.router, expert_names(model)
    nearest, *others = prediction.experts.items()
    if method.num_selected > 1:
        selected = ", ".join(names[name].html() for name in list(prediction.experts)[: method.num_selected])
        also = "the router and " if router is not None and router.knows_classes else ""
        return [f"Classified by {also}the experts {'of ' * bool(_tasks_own(model))}{selected} together."]
    assert prediction.expert is not None
    who = "The nearest expert is that" if prediction.label is None else "Classified by the expert"
    name = names[prediction.expert]
    sentences = [f"{who} of {name.html()}{'' if name.about.endswith('…') else '.'}"]
    if router is not None and others and others[0][1] > 0:
        margin = 1 - nearest[1] / others[0][1]
        (place,) = margin_bins(np.array([[nearest[1], others[0][1]]])).tolist()
        sentences.append(
            f"The route is {CLEAR[place]}: the nearest {router.landmark} is {percent(margin, 0)} nearer than any "
            "other task's."
        )
        count, right = model.report.route_margins[place] if model.report and model.report.route_margins else (0, 0)
        if count >= FEWEST_MEASURED:
            sentences.append(f"Of {count} test pictures with such a route, {percent(right / count, 0)} came right.")
    came, own = _came_to(model, prediction.expert)
    if came >= FEWEST_MEASURED:
        sentences.append(f"Of {came} test pictures that came to this expert, {percent(own / came, 0)} were its own.")
    return sentences


def _tasks_own(model: ContinualModel) -> bool:
    """Whether every task has an expert of its own."""
    return model.method.expert_of(0) is not None


def _came_to(model: ContinualModel, expert: str) -> tuple[int, int]:
    """How many test pictures were routed to an expert, and how many of them were of its task; zeros if unmeasured."""
    report, names = model.report, [task.name for task in model.config.tasks]
    if report is None or expert not in names or report.tasks != names or not np.any(report.routing_confusion):
        return 0, 0
    confusion = np.array(report.routing_confusion)
    if confusion.shape != (len(names), len(names)):
        return 0, 0
    place = names.index(expert)
    return int(confusion[:, place].sum()), int(confusion[place, place])


def _strip(
    prediction: Prediction,
    model: ContinualModel,
    image: PIL.Image.Image | None,
    like: PIL.Image.Image | None = None,
) -> str:
    """Picture → nearest prototype, or training picture → expert → label, as HTML."""
    steps = []
    if image is not None:
        steps.append(f"<span>{_image(thumbnail(image, 64))}</span>your picture")
    if model.method.routes and prediction.expert is not None and model.method.num_selected == 1:
        name = expert_names(model)[prediction.expert].html()
        if model.router is not None:
            if like is None:
                steps.append(f"<i>{prediction.distance:.2f}</i>to its nearest {escape(model.router.landmark)}")
            else:
                steps.append(f"<span>{_image(thumbnail(like, 64))}</span>most like this training picture")
        steps.append(f"<span>{name}</span>its expert")
    steps.append(f"<b>{bdi(prediction.label) if prediction.label is not None else '?'}</b>the answer")
    return f'<ol class="route" aria-label="The route">{"".join(f"<li>{step}</li>" for step in steps)}</ol>'


def distance_bars(prediction: Prediction, model: ContinualModel) -> str:
    """The distances to all experts in order of learning, as HTML; empty if nothing is routed."""
    if not model.method.routes:
        return ""
    rows = [(name, prediction.experts[key]) for key, name in expert_names(model).items() if key in prediction.experts]
    keys = [key for key in expert_names(model) if key in prediction.experts]
    chosen = list(prediction.experts)[: model.method.num_selected]
    landmark = "" if model.router is None else f" to the nearest {model.router.landmark}"
    what = f"Distance{landmark} of each {'task' if _tasks_own(model) else 'expert'}"
    return bars(rows, [keys.index(key) for key in chosen if key in keys], what)


def landmarks(model: ContinualModel) -> str:
    """What distances are measured to, such as "prototypes"."""
    landmark = "prototype" if model.router is None else model.router.landmark
    return "classes" if landmark == "class" else f"{landmark}s"


def has_choice(model: ContinualModel) -> bool:
    """Whether any of several experts could be asked alone."""
    if not model.method.routes or len(model.bank) < 2:
        return False
    try:
        model.method.choose(model.bank.names[0])
    except ConfigError:
        return False
    return True


def comparison(answers: dict[str, Prediction], model: ContinualModel) -> str:
    """What several experts say of one picture, side by side, as HTML.

    Args:
        answers (`dict[str, Prediction]`): By the name of the expert, the nearest first.
        model ([`ContinualModel`]): The model.

    Returns:
        `str`: HTML, with untrusted names escaped.
    """
    names = expert_names(model)
    cards = "".join(
        f"<li><span>{names[key].html()}</span><b>{bdi(next(iter(found.classes))).replace('_', '_<wbr>')}</b>"
        f"<small>{_confidence(found, model)}<br>"
        f"{found.distance:.2f} away{'' if place else ', the nearest'}</small></li>"
        for place, (key, found) in enumerate(answers.items())
    )
    return f'<ol class="cards" aria-label="Answers of the nearest experts">{cards}</ol>'


def answer(prediction: Prediction, model: ContinualModel) -> str:
    """A prediction in one line, as HTML."""
    if prediction.label is None:
        return f"<p>Its answer to your picture: <b>{NONE}</b>, unlike anything learnt.</p>"
    return f"<p>Its answer to your picture: <b>{bdi(prediction.label)}</b>, {_confidence(prediction, model)}.</p>"


def file_table(rows: Sequence[Sequence[Any]], model: ContinualModel) -> str:
    """Predictions for many pictures, as HTML.

    Args:
        rows (sequence of `(str, str, Prediction)`): Name of each file; its thumbnail; and the prediction, or why there
            is none.
        model ([`ContinualModel`]): The model that made them.

    Returns:
        `str`: HTML, with untrusted names escaped.
    """
    names = expert_names(model) if model.method.routes else None
    body = "".join(
        f"<tr><td>{_image(small)}</td>{_cells(found, model, names)}<td>{bdi(file)}</td></tr>"
        for file, small, found in rows
    )
    columns = ("Picture", "Answer", "Confidence", *([] if names is None else ["Expert"]), "File")
    heads = "".join(f"<th scope=col>{text}</th>" for text in columns)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="files" role=region tabindex=0 aria-label="Predictions">{table}</div>'


def _image(address: str | None) -> str:
    return f'<img src="{address}" alt="">' if address else ""


def _cells(found: Prediction | VisitorError, model: ContinualModel, names: dict[str, Name] | None) -> str:
    if isinstance(found, VisitorError):
        return f'<td colspan={2 if names is None else 3} class="problem">{bdi(str(found))}</td>'
    label = NONE if found.label is None else f"<b>{bdi(found.label)}</b>"
    sure = "" if found.label is None else _confidence(found, model)
    cells = f"<td>{label}</td><td>{sure}</td>"
    if names is None:
        return cells
    expert = "" if found.expert is None else names[found.expert].html() if found.expert in names else bdi(found.expert)
    return f"{cells}<td>{expert}</td>"


def accuracy_table(model: ContinualModel, step: int) -> str:
    """The accuracy matrix up to a task, as HTML."""
    report = model.report
    if report is None or not report.tasks:
        return "<p>No accuracy was measured while this model was trained.</p>"
    matrix, names = np.array(report.accuracy_matrix, dtype=float)[:step, :step], task_names(model)[:step]
    return heat_table(matrix, names, names, "After \\ on task, %")


def routing_table(model: ContinualModel, step: int) -> str:
    """The routing confusion, which is measured after the last task, as HTML."""
    report = model.report
    if report is None or not np.any(report.routing_confusion):
        return "<p>Routing was not measured for this model.</p>"
    if step < len(model.config.tasks):
        return f"<p>This was measured after task {len(model.config.tasks)}: move the slider there to see it.</p>"
    confusion = np.array(report.routing_confusion, dtype=float)
    sums = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, sums, out=np.full_like(confusion, np.nan), where=sums > 0)
    rows, columns = task_names(model), list(expert_names(model).values())
    if len(columns) != share.shape[1]:  # of a method whose experts are not those of its report
        columns = [Name(text, "", text) for text in report.experts]
    return heat_table(share, rows, columns, "Of \\ to task, %")


def point_map(now: ContinualModel, past: ContinualModel, query: torch.Tensor | None = None) -> str | None:
    """Prototypes and a picture's query features, on the plane in which those of the whole model spread most, as HTML.

    Args:
        now ([`ContinualModel`]): The model after its last task, to which the plane is fitted.
        past ([`ContinualModel`]): The same model after a task, whose points are shown.
        query (`torch.Tensor` of shape `(1, query_size)`, *optional*): Query features of the picture.

    Returns:
        `str`: SVG in HTML; `None` for fewer than two points, or without a router of the named experts.
    """
    if now.router is None or past.router is None:
        return None
    every, (vectors, numbers) = _points(now), past.router.points()
    names = list(expert_names(past).values())
    if len(every) < 2 or not len(vectors) or int(numbers.max()) >= len(names):
        return None
    shown = vectors.detach().float().cpu().numpy()
    picture = shown[:0] if query is None else torch.nn.functional.normalize(query, dim=-1).float().cpu().numpy()
    return map_of(Plane.of(every), shown, numbers.cpu().numpy(), names, picture)


def _points(model: ContinualModel) -> np.ndarray:
    assert model.router is not None
    return model.router.points()[0].detach().float().cpu().numpy()


def learnt(model: ContinualModel, step: int, small: dict[str, list[PIL.Image.Image]] | None = None) -> str:
    """The tasks that a model had learnt after `step` tasks, as HTML, with some training pictures of each."""
    tasks = model.config.tasks
    items = "".join(
        f"<li{'' if i < step else ' class=later'}>{name.html()}"
        f"{f' · {task.num_train_images} pictures' if task.num_train_images else ''}"
        f"{'' if i < step else ' <em>not yet learnt</em>'}"
        f"<span>{''.join(_image(thumbnail(one)) for one in (small or {}).get(task.name, []))}</span></li>"
        for i, (task, name) in enumerate(zip(tasks, task_names(model), strict=True))
    )
    return f'<p>After task {step} of {len(tasks)}:</p><ol class="tasks" tabindex=0 aria-label="Tasks">{items}</ol>'


def lesson(found: Lesson, classes: dict[str, list], model: ContinualModel, left_out: Sequence[str] = ()) -> str:
    """The result of teaching a model, as HTML: what was learnt, how well, what it changed, and what would help."""
    names = ", ".join(f"<b>{bdi(label)}</b> ({len(pictures)} pictures)" for label, pictures in classes.items())
    copied = {label: count for label, pictures in classes.items() if (count := different(pictures)) < FEWEST}
    few = found.recognised < WELL * found.tried
    text = f"<p>{'Taught' if few or copied else LEARNT} {names} in {found.seconds:.0f} seconds. "
    if found.tried:
        of = "your {}" if found.tried == sum(map(len, classes.values())) else "{} of your"
        text += f"<b>{found.recognised} of {of.format(found.tried)} pictures</b> would be recognised "
        text += "if each were new, and the model had seen only the others. "
    else:
        text += "There was no time left to find out how many of your pictures would be recognised. "
    for label, count in copied.items():
        same = "all are the same" if count == 1 else f"only {count} are different"
        text += f"But of the pictures of {bdi(label)} {same}, so it knows no others: give different ones. "
    if few:
        text += f"That is few. {ADVICE}{'' if isinstance(model.method, ClosedForm) else SLDA_PP} "
    if few or copied:
        text += AGAIN
    else:
        text += "Now give it a new picture under <b>Try it</b>."
    text += "</p>"
    if found.answers:
        text += f"<p>No old weight has changed; {found.changed} of {found.answers} answers to the examples have.</p>"
    else:
        text += "<p>No old weight has changed. Answers may have, where a picture is nearer to the new class.</p>"
    text += "".join(f"<p>Left out: {bdi(reason)}</p>" for reason in left_out)
    return text + f"<p>{OWN}</p>"


def own_model(model: ContinualModel) -> str:
    """Says that a visitor uses a model of their own, as HTML."""
    return f"<p>{OWN} It knows {len(model.config.classes)} classes, lastly {bdi(model.config.classes[-1])}.</p>"


def link(url: str) -> str:
    """A link to the Hub, as HTML."""
    return f'<p>Pushed: <a href="{escape(url)}" target="_blank" rel="noopener">{escape(url)}</a></p>'
