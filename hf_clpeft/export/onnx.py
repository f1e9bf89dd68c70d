"""A model as an ONNX graph: one expert as a plain classifier, or the whole with its router and all experts."""

import copy
import json
import runpy
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..backbones.bundled import ASSETS
from ..config.errors import ConfigError
from ..config.model import CONFIG_NAME
from ..config.text import get_logger
from ..experts import ExpertError
from ..model import ContinualModel
from .graph import check_installed, difference, open_graph, write_graph
from .int8 import agreement, quantize
from .merged import TOLERANCE, merge_expert
from .places import written


logger = get_logger(__name__)

GRAPH = "model.onnx"
SCRIPT = "predict.py"
LEAST_AGREEMENT = 0.9  # of an int8 graph with the exact one, on pictures that were given


class _Routed(torch.nn.Module):
    """Logits of all classes; and the expert of each image, if experts judge images."""

    def __init__(self, model: ContinualModel, routed: bool):
        super().__init__()
        self.model, self.routed = model, routed

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values)
        assert output.logits is not None and output.selection is not None
        chosen = output.selection.reshape(output.logits.shape[0], -1)[:, 0]
        return (output.logits, chosen) if self.routed else (output.logits,)


class _Plain(torch.nn.Module):
    """Logits of a classifier of `transformers`."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model(pixel_values=pixel_values).logits,)


def export_onnx(
    model: ContinualModel,
    folder: str | Path,
    task: str | None = None,
    int8: bool = False,
    pictures: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Exports a model as an ONNX graph for batches of any size, with `predict.py`, which uses it without torch.

    The input is `pixel_values`, normalised images. The outputs are `logits`, of all classes, −inf for classes unknown
    to the chosen experts; and, of a model with several experts, `expert`, the index of the nearest one. The softmax of
    the logits is [`Prediction.score`]. `config.json` has the names of classes (`id2label`) and experts. The graph is
    run in onnxruntime, and its answers are compared with those of the model, before anything is written.

    Args:
        model ([`ContinualModel`]): A model in `float32`; it is not modified.
        folder (`str` or `Path`): Created if missing.
        task (`str`, *optional*): Export only the expert of this task, merged into the backbone, as a classifier of its
            classes; see [`export_merged`]. Default: the whole model.
        int8 (`bool`, *optional*, defaults to `False`): Round the weights of the backbone to 8 bits.
        pictures (iterable of images, *optional*): On which the rounded graph is compared with the exact one; as for
            [`~ContinualModel.predict`]. Default: invented pictures.
        overwrite (`bool`, *optional*, defaults to `False`): Replace another model in the folder.

    Returns:
        `dict`: `difference` of the logits, relative to the largest or to 1; `bytes` of the graph; and, of one that is
        rounded, `agreement`, the share of pictures for which both name the same class.

    Raises:
        [`ConfigError`]: The libraries of ONNX are missing, the model has learnt no task or not this one, the folder
            holds another model, or a rounded graph names other classes than the exact one for a tenth of `pictures`.
        [`ExpertError`]: The model cannot be one graph, the backbone is not in `float32`, or answers differ.
        `OSError`: It cannot be written; the folder is unchanged.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.export import export_onnx

    >>> model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    >>> facts = export_onnx(model, "digits-onnx", task="task-000")  # without, the routed model in one graph
    >>> facts["difference"] < 1e-4
    True

    ```
    """
    check_installed()
    if not model.config.tasks:
        raise ConfigError("This model has learnt no task yet, so that there is nothing to export.")
    dtype = model.backbone.model.dtype
    if dtype != torch.float32:
        raise ExpertError(f"A graph is written in float32, and this model is in {dtype}; load it in float32.")
    with TemporaryDirectory() as place:
        path = Path(place, GRAPH)
        facts, config = _write(model, task, path)
        if int8:
            path = Path(place, "int8.onnx")
            facts |= _round(model, Path(place, GRAPH), path, pictures)
        facts["bytes"] = sum(file.stat().st_size for file in Path(place).glob(f"{path.name}*"))
        with written(folder, overwrite) as staging:
            for file in Path(place).glob(f"{path.name}*"):  # weights of more than 2 GB have a file of their own
                shutil.copyfile(file, staging / file.name.replace(path.name, GRAPH))
            (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            model.backbone.processor.save_pretrained(staging)
            shutil.copyfile(ASSETS / "onnx" / SCRIPT, staging / SCRIPT)
            if not _prepares(staging, model):
                (staging / SCRIPT).unlink()
                logger.warning(
                    "%s has an image processor that %s does not know; prepare images with AutoImageProcessor.",
                    model.backbone.config.name_or_path,
                    SCRIPT,
                )
    return facts


def _write(model: ContinualModel, task: str | None, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes and checks the exact graph; returns what is to be told, and the configuration."""
    shape = model.backbone.input_shape
    pixels = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    module: torch.nn.Module
    if task is None:
        pixels = pixels.to(model.device)
        with torch.no_grad():
            output = model(pixels)  # also reads, once, what a graph cannot
        assert output.distances is not None
        routed = model.method.reads and output.distances.shape[1] == len(model.bank) > 1
        module, labels = _Routed(model, routed), model.config.classes
        own: Any = copy.deepcopy(model.backbone.model.config)
        own.id2label = dict(enumerate(labels))
        own.label2id = {label: number for number, label in own.id2label.items()}
        experts, tasks = model.bank.names if routed else [], [learnt.name for learnt in model.config.tasks]
    else:
        classifier = merge_expert(model, task)
        module, routed, own = _Plain(classifier), False, classifier.config
        own.architectures = [type(classifier).__name__]
        experts, tasks = [], [task]
    with model.bank.reading():
        write_graph(module, pixels, ["logits", "expert"] if routed else ["logits"], path)
        session = open_graph(path)
        far = max(difference(session, module, some) for some in (pixels, pixels[:1]))
    if not far <= TOLERANCE:
        raise ExpertError(
            f"The graph's logits differ by {far:.2g} of the largest from the model's; nothing is written."
        )
    known = {"method": model.method.name, "experts": experts, "tasks": tasks}
    return {"difference": far}, {**own.to_dict(), "hf_clpeft": known}


def _round(model: ContinualModel, exact: Path, rounded: Path, pictures: Any) -> dict[str, Any]:
    quantize(exact, rounded)
    share, count = agreement(model, open_graph(exact), open_graph(rounded), pictures)
    if share < LEAST_AGREEMENT:
        told = f"The int8 graph names the same class as the exact one for {share:.1%} of {count} pictures"
        if pictures is not None:
            raise ConfigError(f"{told}, which is too few: export it without int8.")
        logger.warning("%s, which are invented. Give pictures of yours (--pictures) to know for those.", told)
    return {"agreement": share, "pictures": count}


def _prepares(folder: Path, model: ContinualModel) -> bool:
    """Whether the script in a folder prepares a picture as the model does."""
    script = runpy.run_path(str(folder / SCRIPT), run_name="predict")
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((240, 180), PIL.Image.Resampling.BICUBIC)
    transform = model.backbone.transform
    wanted = transform.normalize(torch.from_numpy(transform.resize([picture]))).numpy()[0]
    try:
        found = script["prepare"](picture, json.loads((folder / "preprocessor_config.json").read_text("utf-8")))
    except (KeyError, TypeError, ValueError):  # of settings that it does not know
        return False
    return found[: len(wanted)].shape == wanted.shape and bool(np.allclose(found[: len(wanted)], wanted, atol=1e-3))
