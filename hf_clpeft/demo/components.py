"""Gradio components that pass uploads on as paths, so that all pictures are decoded by one validated reader.

Gradio's own components decode pictures themselves, with their own error messages; and they fetch any URL in a request,
which would allow server-side request forgery (SSRF).
"""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_http_url_like
from starlette.types import ASGIApp, Receive, Scope, Send


BRUSH = 32  # of 280 pixels: of 100 drawn digits, 92 or more are right, whatever their size; with 15 only 86


def _path_of(file: Any) -> str:
    """Path of a file, after checking that it was uploaded."""
    if not file.path or not is_in_or_equal(file.path, get_upload_folder()) or not Path(file.path).is_file():
        raise gr.Error("Upload the file first.", print_exception=False)
    return file.path


async def _never_fetch(component: Block, url_or_file_path: str | Path | None) -> str | None:
    address = str(url_or_file_path)
    if url_or_file_path is not None and is_http_url_like(address):
        path = address.partition("/gradio_api/file=")[2]
        if path:  # an assistant names a file that it has uploaded by its address here; `_path_of` checks it
            return path
        raise gr.Error("Links are not fetched: download the file, and upload it.", print_exception=False)
    return await Block.async_move_resource_to_block_cache(component, url_or_file_path)


def _paths_of(component: Block, payload: Any) -> list[str] | None:
    return None if payload is None else [_path_of(file) for file in payload.root]


def _example(name: str) -> dict:
    """An uploaded file, for the examples of the API docs."""
    return {"path": name, "meta": {"_type": "gradio.FileData"}}


class Picture(gr.Image):
    """A picture, as the path of the uploaded file."""

    is_template = True  # the browser renders its parent class
    async_move_resource_to_block_cache = _never_fetch

    def preprocess(self, payload: Any) -> str | None:
        """The path."""
        return None if payload is None else _path_of(payload)

    def example_payload(self) -> dict:
        """Example for the API docs."""
        return _example("digit.png")


class Files(gr.File):
    """Several files, as their paths."""

    is_template = True
    async_move_resource_to_block_cache = _never_fetch
    preprocess = _paths_of

    def example_payload(self) -> list[dict]:
        """Example for the API docs."""
        return [_example("digit.png"), _example("more.zip")]


class Archive(gr.UploadButton):
    """One file, as its path."""

    is_template = True
    async_move_resource_to_block_cache = _never_fetch

    def preprocess(self, payload: Any) -> str | None:
        """The path."""
        return None if payload is None else _path_of(payload)

    def example_payload(self) -> dict:
        """Example for the API docs."""
        return _example("model.zip")


class Folder(gr.UploadButton):
    """The files of a folder, as their paths."""

    is_template = True
    async_move_resource_to_block_cache = _never_fetch
    preprocess = _paths_of


class Canvas(gr.ImageEditor):
    """A drawing with its layers merged, as the bytes or the path of its file."""

    is_template = True
    async_move_resource_to_block_cache = _never_fetch

    def example_payload(self) -> dict:
        """Example for the API docs."""
        return {"background": None, "layers": [], "composite": _example("drawing.png")}

    def preprocess(self, payload: Any) -> bytes | str | None:  # type: ignore[override]  # not the parent's decoded image
        """Bytes or path of the drawing."""
        if payload is None:
            return None
        blobs = self.blob_storage.pop(payload.id, None) if payload.id is not None else None
        if blobs is not None:
            return blobs.composite
        return None if payload.composite is None else _path_of(payload.composite)


class Step(gr.Slider):
    """A slider that passes its value on unchecked; the handler validates it."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        """The value as it is."""
        return payload


def textbox(label: str, example: str, **options: Any) -> gr.Textbox:
    """A text box with an example for the API docs."""
    box = gr.Textbox(label=label, **options)
    box.example_payload = lambda: example  # type: ignore[method-assign]
    return box


def canvas(elem_id: str) -> Canvas:
    """A white canvas with a thick black brush, which is selected already."""
    pad = Canvas(
        label="Drawing",
        show_label=False,
        height=380,
        elem_id=elem_id,
        buttons=[],
        canvas_size=(280, 280),
        fixed_canvas=True,
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=BRUSH, colors=["#000000"], default_color="#000000", color_mode="fixed"),
        eraser=gr.Eraser(default_size=50),
    )
    pad.clear(fn=None, js=take_brush(elem_id))
    return pad


def take_brush(elem_id: str) -> str:
    """JavaScript that selects the brush as soon as its button is rendered."""
    return f"""() => {{
        const wait = setInterval(() => {{
            const brush = document.querySelector('#{elem_id} button[aria-label="Brush"]');
            if (brush) {{ clearInterval(wait); brush.click(); }}
        }}, 200);
        setTimeout(() => clearInterval(wait), 15000);
    }}"""


class NeverFetch:
    """ASGI middleware: blocks gradio's routes that fetch URLs (`/file=http…`, `/proxy=`)."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ("/file=http" in scope["path"] or "/proxy=" in scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"Not allowed"})
            return
        await self.app(scope, receive, send)
