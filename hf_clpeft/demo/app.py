"""Layout of the page, and which method of [`Handlers`] each event calls. One function per tab."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency
from starlette.middleware import Middleware

from ..backbones.bundled import DIGITS_MODEL, bundled_folder
from ..model import ContinualModel
from . import views
from .components import Files, Folder, NeverFetch, Picture, Step, canvas, take_brush, textbox
from .handlers import NEAREST, TABLE, Handlers
from .models import Models
from .pictures import FORMATS, LARGEST_ARCHIVE
from .teaching import FEWEST, refusal


FILE_TYPES = [f".{name.lower()}" for name in (*FORMATS, "JPG", "TIF", "ZIP")]
VISITORS = 64  # requests handled concurrently
SHARED: dict[str, Any] = {"concurrency_limit": VISITORS}
SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # no request to a font server
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Soft(primary_hue="blue", font=SYSTEM_FONTS, font_mono=("ui-monospace", "monospace")),
    "css_paths": Path(__file__).with_name("page.css"),
    "footer_links": ["api", "settings"],
    "run_history": False,
    "max_file_size": LARGEST_ARCHIVE,
    "max_threads": VISITORS,
    "state_session_capacity": 4 * VISITORS,
    "app_kwargs": {"middleware": [Middleware(NeverFetch)]},
}
"""Keywords for `launch()`."""


def build_demo(
    source: str,
    revision: str | None = None,
    backbone: str | None = None,
    examples: Sequence[Path] | None = None,
    drawing: bool | None = None,
    teaching: bool = False,
) -> gr.Blocks:
    """Builds the page for one model. Launch it with the keywords in `LAUNCH`.

    Args:
        source (`str`): Repo id or folder of the model.
        revision (`str`, *optional*): Branch, tag or commit of the repo.
        backbone (`str`, *optional*): Repo id or folder of the backbone, if it has moved.
        examples (sequence of `Path`, *optional*): Example pictures. Default: those in the folder `examples` of a
            local model.
        drawing (`bool`, *optional*): Let visitors draw digits. Default: `True` for the bundled digits model.
        teaching (`bool`, *optional*, defaults to `False`): Let visitors teach new classes, each to a model of
            their own.

    Returns:
        `gradio.Blocks`

    Example:

    ```py
    >>> from hf_clpeft.demo import LAUNCH, build_demo

    >>> demo = build_demo("hf-clpeft/s-lora-digits", teaching=True)
    >>> _ = demo.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    >>> demo.close(verbose=False)

    ```
    """
    models = Models(source, revision, backbone)
    if drawing is None:
        drawing = source == DIGITS_MODEL
    if examples is None:
        examples = sorted(Path(bundled_folder(source) or source, "examples").glob("*.*"))
    handlers = Handlers(models, examples)
    with gr.Blocks(title="Which expert?", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        key = textbox("Key", example="", value="", visible=False)
        gr.HTML(views.introduction(models.served, source))
        with gr.Tab("Try it"):
            picture, expert = _try_it(handlers, key, examples, drawing)
        with gr.Tab("Many pictures"):
            _many_pictures(handlers, key)
        with gr.Tab("Look inside") as tab:
            step, plane = _look_inside(handlers, key, picture, tab)
        reason = refusal(models.served)
        if teaching and reason is not None:
            with gr.Tab("Teach it"):
                gr.Markdown(reason)
        elif teaching:
            with gr.Tab("Teach it"):
                taught = _teach_it(handlers, key, drawing)
                taught.success(
                    lambda key: _updated(models.get(key)),
                    key,
                    [expert, step, plane],
                    api_visibility="private",
                    show_progress="hidden",
                )
    return demo


def _try_it(
    handlers: Handlers, key: gr.Textbox, examples: Sequence[Path], drawing: bool
) -> tuple[Picture, gr.Dropdown]:
    model = handlers.models.served
    method, landmark = model.method, "" if model.router is None else model.router.landmark
    of_tasks = method.expert_of(0) is not None
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            picture = Picture(
                sources=["upload", "clipboard", "webcam"],
                label="Picture",
                height=280,
                format="png",
                buttons=["fullscreen"],
                elem_id="picture",
            )
            if drawing:
                with gr.Accordion("Draw a digit instead", open=False) as pad:
                    drawn = canvas("pad")
                    draw = gr.Button("Which digit is it?", variant="primary")
                pad.expand(fn=None, js=take_brush("pad"))
                draw.click(handlers.scan_drawing, drawn, picture, api_name="scan_drawing", **SHARED)
            if examples:
                gr.Examples([[str(path)] for path in examples], picture, label="Examples", api_visibility="private")
            expert = gr.Dropdown(
                _choices(model),
                value=NEAREST,
                label="Expert",
                info="Choose another one to see its prediction.",
                allow_custom_value=True,  # experts taught later are not in this list
                visible=method.routes and of_tasks,
            )
        with gr.Column(min_width=300):
            verdict = gr.HTML(label="Verdict", elem_id="verdict", min_height=90)
            likeliest = gr.Label(num_top_classes=5, label="Likeliest classes", show_heading=False)
            one = f"the nearest {landmark} of each task" if of_tasks else f"each expert's {landmark}"
            what = one if landmark else "each expert"
            gr.Markdown(f"#### Distance to {what}", visible=method.routes)
            distances = gr.BarPlot(
                x="expert",
                y="distance",
                color="part",
                color_map={"chosen": "#2563eb", "others": "#94a3b8"},
                colors_in_legend=[],
                x_title=" ",
                y_title=" ",
                x_label_angle=0 if of_tasks else -45,  # a pool has many
                y_lim=[0, 1.5 if landmark in ("prototype", "key") else None],  # one scale, if distances are bounded
                height=280,
                buttons=[],
                label="Distances",
                show_label=False,
                visible=method.routes,
                elem_id="distances",
            )
            with gr.Accordion("As JSON", open=False):
                details = gr.JSON(label="Prediction", show_label=False)
    gr.on(
        [picture.change, expert.input, key.change],
        handlers.predict,
        [picture, expert, key],
        [verdict, likeliest, distances, details],
        api_name="predict",
        show_progress="minimal",
        **SHARED,
    )
    return picture, expert


def _many_pictures(handlers: Handlers, key: gr.Textbox) -> None:
    files = Files(file_count="multiple", file_types=FILE_TYPES, label="Pictures, or zip archives of pictures")
    classify = gr.Button("Classify", variant="primary")
    widths: list[str | int] = ["17%", "15%", "10%", "12%", "12%", "13%", "21%"]
    table = gr.Dataframe(headers=TABLE, label="Predictions", interactive=False, wrap=True, column_widths=widths)
    sheet = gr.File(label="The same as CSV", interactive=False)
    classify.click(handlers.predict_files, [files, key], [table, sheet], api_name="predict_files", **SHARED)


def _look_inside(handlers: Handlers, key: gr.Textbox, picture: Picture, tab: gr.Tab) -> tuple[Step, gr.ScatterPlot]:
    model = handlers.models.served
    steps = len(model.config.tasks)
    step = Step(1, steps, value=steps, step=1, label="The model as it was after task", elem_id="step")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            learnt = gr.HTML(label="Tasks", elem_id="tasks")
            answer = gr.Label(label="Its answer to your picture", num_top_classes=3)
        with gr.Column(min_width=300, scale=2):
            landmark = "" if model.router is None else model.router.landmark
            what = "Class means" if landmark == "class" else f"{landmark.capitalize()}s"
            shown = model.router is not None and len(model.router.points()[0]) > 0
            gr.Markdown(f"#### {what} on the plane in which they spread most", visible=shown)
            plane = gr.ScatterPlot(
                x="x",
                y="y",
                color="prototypes of",
                color_map=views.colours(model),
                color_title=" ",
                x_title=" ",
                y_title=" ",
                tooltip=["prototypes of"],
                height=460,
                buttons=[],
                label="Prototypes",
                show_label=False,
                visible=shown,
                elem_id="plane",
            )
    gr.Markdown("#### Accuracy on each task after each task")
    matrix = gr.HTML(label="Accuracy matrix")
    gr.Markdown("#### Where the test pictures of each task went")
    routing = gr.HTML(label="Routing")
    gr.on(
        [tab.select, step.release, key.change],
        handlers.look_inside,
        [step, picture, key],
        [learnt, matrix, routing, plane, answer],
        api_name="look_inside",
        show_progress="minimal",
        **SHARED,
    )
    return step, plane


def _teach_it(handlers: Handlers, key: gr.Textbox, drawing: bool) -> Dependency:
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
            archive = gr.File(label="Your model", interactive=False)
            with gr.Accordion("Push it to the Hub", open=False):
                repo_id = textbox("Repo", example="me/my-digits", placeholder="me/my-digits")
                token = textbox("Your token with write access", example="hf_...", type="password")
                push = gr.Button("Push")
                pushed = gr.HTML(label="Pushed", min_height=30)
    push.click(handlers.push, [repo_id, token, key], pushed, api_name="push")
    return learn.click(handlers.teach, [name, pictures, key], [outcome, key, archive], api_name="teach")


def _choices(model: ContinualModel) -> list[tuple[str, str]]:
    named = views.titles(model).items()
    return [("the nearest, as routed", NEAREST), *((f"{title} ({name})", name) for name, title in named)]


def _updated(model: ContinualModel) -> tuple[gr.Dropdown, Step, gr.ScatterPlot]:
    """Updates of the components that list tasks, after a visitor has taught one."""
    steps = len(model.config.tasks)
    return (
        gr.Dropdown(_choices(model), value=NEAREST),
        Step(maximum=steps, value=steps),
        gr.ScatterPlot(color_map=views.colours(model)),
    )
