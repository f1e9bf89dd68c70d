"""Layout of the page, and which method of [`Handlers`] each event calls. One function per tab."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from starlette.middleware import Middleware

from ..backbones.bundled import DIGITS_MODEL
from ..model import ContinualModel
from . import views
from .access import SPEAK, THEME
from .components import Archive, Files, Folder, NeverFetch, Picture, Step, canvas, take_brush, textbox
from .handlers import Handlers, keep
from .models import Models
from .own import KEEP, RECALL
from .pictures import FORMATS, LARGEST_ARCHIVE
from .teaching import FEWEST, refusal


FILE_TYPES = [f".{name.lower()}" for name in (*FORMATS, "JPG", "TIF", "ZIP")]
VISITORS = 64  # requests handled concurrently
SHARED: dict[str, Any] = {"concurrency_limit": VISITORS}
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def launch_options() -> dict[str, Any]:
    """Keywords for `launch()` of the page; made anew, as gradio keeps some of them and writes into them."""
    return {
        "theme": THEME,
        "css_paths": Path(__file__).with_name("page.css"),
        "footer_links": ["api", "settings"],
        "run_history": False,
        "max_file_size": LARGEST_ARCHIVE,
        "max_threads": VISITORS,
        "state_session_capacity": 4 * VISITORS,
        "app_kwargs": {"middleware": [Middleware(NeverFetch)]},
    }


def build_demo(
    source: str,
    revision: str | None = None,
    backbone: str | None = None,
    examples: Sequence[Path] | None = None,
    drawing: bool | None = None,
    teaching: bool = False,
) -> gr.Blocks:
    """Builds the page for one model. Launch it with [`launch_options`].

    Args:
        source (`str`): Repo id or folder of the model.
        revision (`str`, *optional*): Branch, tag or commit of the repo.
        backbone (`str`, *optional*): Repo id or folder of the backbone, if it has moved.
        examples (sequence of `Path`, *optional*): Example pictures. Default: those that the model carries.
        drawing (`bool`, *optional*): Let visitors draw digits. Default: `True` for the bundled digits model.
        teaching (`bool`, *optional*, defaults to `False`): Let visitors teach new classes, each to a model of
            their own.

    Returns:
        `gradio.Blocks`

    Example:

    ```py
    >>> from hf_clpeft.demo import build_demo, launch_options

    >>> demo = build_demo("hf-clpeft/s-lora-digits", teaching=True)
    >>> _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    >>> demo.close(verbose=False)

    ```
    """
    models = Models(source, revision, backbone)
    if drawing is None:
        drawing = source == DIGITS_MODEL
    if examples is None:
        examples = models.examples()
    handlers = Handlers(models, examples)
    with gr.Blocks(title="Which expert?", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        key = textbox("Key", example="", value="", visible=False)
        intro = gr.HTML(views.introduction(models.served, source), elem_id="intro")
        with gr.Tab("Try it"):
            picture = _try_it(handlers, key, examples, drawing)
        with gr.Tab("Many pictures"):
            _many_pictures(handlers, key)
        with gr.Tab("Look inside") as tab:
            _look_inside(handlers, key, picture, tab)
        reason = refusal(models.served)
        if teaching and reason is not None:
            with gr.Tab("Teach it"):
                gr.Markdown(reason)
        elif teaching:
            with gr.Tab("Teach it"):
                recalled = _teach_it(handlers, key, drawing)
            loaded = demo.load(handlers.recall, key, recalled, js=RECALL, **HIDDEN)
            loaded.then(fn=None, inputs=key, js=KEEP)  # it may not be there any more
            key.change(fn=None, inputs=key, js=KEEP)
            key.change(
                lambda key: views.introduction(models.get(key), source, bool(key)), key, intro, **HIDDEN, **SHARED
            )
        if examples:
            demo.load(lambda: keep(examples[0].read_bytes(), examples[0].name), None, picture, **HIDDEN)
        demo.load(fn=None, js=SPEAK)
    return demo


def _try_it(handlers: Handlers, key: gr.Textbox, examples: Sequence[Path], drawing: bool) -> Picture:
    model = handlers.models.served
    with gr.Row(equal_height=False, elem_id="try"):
        with gr.Column(min_width=300, elem_id="given"):
            picture = Picture(
                sources=["upload", "clipboard", "webcam"],
                label="Picture",
                height=280,
                format="png",
                buttons=["fullscreen"],
                elem_id="picture",
            )
        with gr.Column(min_width=300, elem_id="others"):
            if examples:
                gr.Examples([[str(path)] for path in examples], picture, label="Examples", api_visibility="private")
            if drawing:
                with gr.Accordion("Draw a digit instead", open=False) as pad:
                    drawn = canvas("pad")
                    draw = gr.Button("Which digit is it?", variant="primary")
                pad.expand(fn=None, js=take_brush("pad"))
                draw.click(handlers.scan_drawing, drawn, picture, api_name="scan_drawing", **SHARED)
        with gr.Column(min_width=300, elem_id="found"):
            verdict = gr.HTML(label="Verdict", elem_id="verdict", min_height=90)
            explain = gr.Button("Where does it look?", size="sm", elem_id="explain")
            heat = gr.HTML(label="Where it looks", elem_id="heat")
            grid = gr.JSON(visible=False)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            likeliest = gr.Label(num_top_classes=5, label="Likeliest classes", show_heading=False)
            shown = views.has_choice(model)
            gr.Markdown("## What the nearest experts say", visible=shown)
            side_by_side = gr.HTML(label="Answers of the nearest experts", elem_id="experts", visible=shown)
            answers = gr.JSON(visible=False)
        with gr.Column(min_width=300):
            to = f" to {views.landmarks(model)}" if model.router is not None else ""
            gr.Markdown(f"## Distance{to}, in order of learning", visible=model.method.routes)
            distances = gr.HTML(label="Distances", elem_id="distances", visible=model.method.routes)
    with gr.Accordion("As JSON", open=False):
        details = gr.JSON(label="Prediction", show_label=False)
    found = gr.on(
        [picture.change, key.change],
        handlers.predict,
        [picture, key],
        [verdict, likeliest, distances, details],
        api_name="predict",
        show_progress="minimal",
        **SHARED,
    )
    explain.click(handlers.explain, [picture, key], [heat, grid], api_name="explain", **SHARED)
    found.then(lambda: "", None, heat, **HIDDEN)  # it was that of another picture
    stale = [verdict, likeliest, distances, details, side_by_side, answers]
    found.failure(lambda: ("", None, "", None, "", None), None, stale, **HIDDEN)
    found.success(
        handlers.compare_experts,
        [picture, key],
        [side_by_side, answers],
        api_name="compare_experts",
        show_progress="hidden",
        **SHARED,
    )
    return picture


def _many_pictures(handlers: Handlers, key: gr.Textbox) -> None:
    files = Files(file_count="multiple", file_types=FILE_TYPES, label="Pictures, or zip archives")
    classify = gr.Button("Classify", variant="primary")
    table = gr.HTML(label="Predictions", elem_id="predictions")
    sheet = gr.File(label="The same as CSV", interactive=False, visible=False)
    found = classify.click(handlers.predict_files, [files, key], [table, sheet], api_name="predict_files", **SHARED)
    found.success(lambda: gr.File(visible=True), None, sheet, **HIDDEN)  # an empty box says nothing


def _look_inside(handlers: Handlers, key: gr.Textbox, picture: Picture, tab: gr.Tab) -> None:
    model = handlers.models.served
    step = _last(model, step=1, label="The model as it was after task", elem_id="step")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            answer = gr.HTML(label="Its answer to your picture", elem_id="answer")
            learnt = gr.HTML(label="Tasks", elem_id="tasks")
        with gr.Column(min_width=300, scale=2):
            shown = model.router is not None and len(model.router.points()[0]) > 0
            what = views.landmarks(model).replace("classes", "class means").capitalize()
            gr.Markdown(f"## {what} on the plane in which they spread most", visible=shown)
            plane = gr.HTML(label="Map", visible=shown, elem_id="plane")
    gr.Markdown("## Accuracy on each task after each task")
    matrix = gr.HTML(label="Accuracy matrix")
    routes = model.method.routes
    gr.Markdown("## Where the test pictures of each task went", visible=routes)
    routing = gr.HTML(label="Routing", visible=routes)
    given, told = [step, picture, key], [learnt, matrix, routing, plane, answer]
    gr.on(
        [tab.select, step.change],
        handlers.look_inside,
        given,
        told,
        api_name="look_inside",
        show_progress="hidden",
        trigger_mode="always_last",  # the slider passes many values while it is dragged
        **SHARED,
    )
    # Another model may have fewer tasks: first the slider, then what it shows.
    settled = key.change(lambda key: _last(handlers.models.get(key)), key, step, **HIDDEN)
    settled.then(handlers.look_inside, given, told, **HIDDEN, **SHARED)


def _teach_it(handlers: Handlers, key: gr.Textbox, drawing: bool) -> list[Component]:
    """Returns what shows the model that was taught before: the words for it, its key, and its archive."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            gr.Markdown(
                "Name a class and give about five pictures of it, or a zip archive with one folder of pictures for "
                "each class."
            )
            name = textbox("Name of the new class", example="letter A", max_length=40, elem_id="class-name")
            pictures = Files(
                file_count="multiple",
                file_types=FILE_TYPES,
                label=f"Its pictures, {FEWEST} or more",
                elem_id="lessons",
            )
            folder = Folder("Add all pictures of a folder", file_count="directory")
            folder.upload(
                lambda more, files: [*(files or []), *more], [folder, pictures], pictures, api_visibility="private"
            )
            if drawing:
                with gr.Accordion("Draw them", open=False) as pad:
                    drawn = canvas("lesson-pad")
                    add = gr.Button("Add this drawing")
                pad.expand(fn=None, js=take_brush("lesson-pad"))
                add.click(handlers.add_drawing, [drawn, pictures], pictures, api_name="add_drawing", **SHARED)
            learn = gr.Button("Teach", variant="primary")
        with gr.Column(min_width=300):
            outcome = gr.HTML(label="Outcome", elem_id="outcome", min_height=90)
            archive = gr.File(label="Your model", interactive=False, visible=False)
            forget = gr.Button("Forget what I taught", visible=False, elem_id="forget")
            returned = Archive("Upload a model you downloaded", file_types=[".zip"], elem_id="returned")
            with gr.Accordion("Push it to the Hub", open=False):
                repo_id = textbox("Repo", example="me/my-digits", placeholder="me/my-digits")
                token = textbox("Your token with write access", example="hf_...", type="password", elem_id="token")
                push = gr.Button("Push")
                pushed = gr.HTML(label="Pushed", min_height=30)
    pushing = push.click(handlers.push, [repo_id, token, key], pushed, api_name="push")
    pushing.then(lambda: "", None, token, **HIDDEN)  # nobody who comes to this screen later shall find it
    returned.upload(handlers.give_back, returned, [outcome, key], api_name="give_back")
    forget.click(lambda: ("", "", gr.File(None, visible=False)), None, [outcome, key, archive], **HIDDEN)
    key.change(lambda key: gr.Button(visible=bool(key)), key, forget, **HIDDEN)
    taught = learn.click(handlers.teach, [name, pictures, key], [outcome, key, archive], api_name="teach")
    taught.success(lambda: gr.File(visible=True), None, archive, **HIDDEN)
    taught.success(
        _clear, [outcome, name, pictures], [name, pictures], api_visibility="private", show_progress="hidden"
    )
    return [outcome, key, archive]


def _clear(outcome: str, name: str, pictures: list[str] | None) -> tuple[str, list[str] | None]:
    """Empties the name and the pictures after a lesson that went well; another is tried again with more."""
    return ("", None) if outcome.startswith(f"<p>{views.LEARNT}") else (name, pictures)


def _last(model: ContinualModel, **options: Any) -> Step:
    """The slider at the last task; out of sight while there is one task only."""
    steps = len(model.config.tasks)
    return Step(1, max(2, steps), value=steps, visible=steps > 1, **options)
