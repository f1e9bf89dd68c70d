"""ONNX graphs whose backbone has weights of 8 bits."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..model import ContinualModel
from ..prediction import read_batches
from .graph import run_graph


if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MOST_PICTURES = 1_000
INVENTED = 64  # pictures, where none are given
# Where the layers of a backbone are: its linear maps hold nearly all weights, and routers and heads need their bits.
QUANTIZED = "hf_clpeft.backbones.backbone.Backbone", "transformers.models."
EXACT = "/model.classifier: "


def quantize(source: Path, target: Path) -> None:
    """Writes a graph with the weights of its backbone in 8 bits; inputs of layers are quantised as they come.

    Args:
        source (`Path`): Graph from [`write_graph`].
        target (`Path`): File to write.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    nodes, graph = [], onnx.load(source)
    graph.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # `write_graph` has folded it
    for node in graph.graph.node:
        place = next((item.value for item in node.metadata_props if item.key == "namespace"), "")
        rounded = any(name in place for name in QUANTIZED) and EXACT not in place
        if rounded and node.op_type in ("MatMul", "Gemm"):
            nodes.append(node.name)
    quantize_dynamic(graph, target, nodes_to_quantize=nodes, per_channel=True)


def agreement(
    model: ContinualModel, exact: "InferenceSession", rounded: "InferenceSession", pictures: Any = None
) -> tuple[float, int]:
    """On how many pictures two graphs name the same class.

    Args:
        model ([`ContinualModel`]): Its image processing is used.
        exact, rounded (`onnxruntime.InferenceSession`): The graphs.
        pictures (iterable of images, *optional*): Default: invented ones, of which a model knows nothing and is
            therefore less sure than of its own.

    Returns:
        The share in [0, 1], and the number of pictures.
    """
    same = count = 0
    for pixels in _pixels(model, pictures):
        one, other = (run_graph(session, pixels)[0].argmax(axis=1) for session in (exact, rounded))
        same, count = same + int((one == other).sum()), count + len(one)
    return same / max(1, count), count


def _pixels(model: ContinualModel, pictures: Any) -> Iterator[torch.Tensor]:
    transform = model.backbone.transform
    batches: Iterable = _invented() if pictures is None else read_batches(islice(pictures, MOST_PICTURES), 16)
    for batch in batches:
        yield transform.normalize(torch.from_numpy(transform.resize(batch)))


def _invented() -> Iterator[list[np.ndarray]]:
    """Coloured clouds of several sizes."""
    generator = torch.Generator().manual_seed(0)
    for size in [2, 4, 8, 16] * (INVENTED // 64):
        noise = torch.rand(16, 3, size, size, generator=generator)
        clouds = torch.nn.functional.interpolate(noise, (64, 64), mode="bilinear")
        yield [*(255 * clouds).byte().permute(0, 2, 3, 1).numpy()]
