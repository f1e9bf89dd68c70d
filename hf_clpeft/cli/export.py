"""`hf-clpeft export`: exports a model, or one expert, for use without this library."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .common import AsJson, BackbonePath, Device, Overwrite, Repo, Token, load_model, show
from .sources import find_pictures


def export(
    repo: Repo,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    task: Annotated[
        str | None, typer.Argument(help="Name of a task; `hf-clpeft info` lists them. With --onnx: all by default.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the expert into the backbone.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX graph, for onnxruntime.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Round the graph's weights to 8 bits; with --onnx.")] = False,
    pictures: Annotated[
        str | None, typer.Option(help="Pictures on which an int8 graph is compared with the exact one; a folder.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    backbone: BackbonePath = None,
    token: Token = None,
    device: Device = None,
) -> None:
    """Export one expert as a PEFT adapter or a transformers classifier, or all of a model as an ONNX graph."""
    from ..config.errors import OptionError
    from ..export import export_adapter, export_merged, export_onnx

    if int8 > onnx or (pictures is not None and not int8):
        raise OptionError("--int8 goes with --onnx, and --pictures with --int8.")
    if task is None and not onnx:
        raise OptionError("Name the task whose expert is exported; all of a model can be exported with --onnx.")
    if onnx and merge:
        raise OptionError("With --onnx and a task, its expert is merged anyway; leave out --merge.")
    samples = None if pictures is None else find_pictures([pictures])
    model = load_model(repo, backbone, token, device)
    facts = {"folder": str(output), "task": task or "all"}
    if onnx:
        found = export_onnx(model, output, task, int8, samples, overwrite)
        facts["what"] = f"ONNX graph, {found['bytes'] / 1e6:.1f} MB{', int8' if int8 else ''}"
        if int8:
            facts["same answers"] = f"{found['agreement']:.1%} of {found['pictures']} pictures"
        facts["next"] = f"python {quote(str(output / 'predict.py'))} picture.jpg"
    elif merge:
        assert task is not None
        export_merged(model, task, output, overwrite)
        facts |= {"what": "transformers image classifier", "next": f'pipeline("image-classification", "{output}")'}
    else:
        assert task is not None
        export_adapter(model, task, output, overwrite)
        facts |= {"what": "PEFT adapter", "next": f'PeftModel.from_pretrained(vit, "{output}")'}
    show(facts, as_json)
