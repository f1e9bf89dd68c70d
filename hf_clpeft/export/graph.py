"""From a module of torch to an ONNX file, and back to its answers in onnxruntime."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config.errors import ConfigError, HfClpeftError
from ..experts import ExpertError


if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INPUT = "pixel_values"
OPSET = 18
MOST = 2**40  # no limit on the size of a constant
NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Raises [`ConfigError`] unless the libraries of ONNX are installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {" and ".join(missing)}: pip install "hf-clpeft[onnx]"')


def write_graph(module: torch.nn.Module, pixels: torch.Tensor, outputs: Sequence[str], path: Path) -> None:
    """Writes a module as an ONNX graph for batches of any size.

    Args:
        module (`torch.nn.Module`): Maps images to a tuple of tensors.
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`): Two images or more, on its device.
        outputs (sequence of `str`): Names of its outputs.
        path (`Path`): File to write.

    Raises:
        [`ExpertError`]: The module does more than one graph can, or something that ONNX has no operator for.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    shapes = {INPUT: {0: torch.export.Dim("batch", min=1)}}
    with _quiet(), torch.no_grad():
        try:
            recorded = torch.export.export(module, (pixels,), dynamic_shapes=shapes)
        except HfClpeftError:
            raise
        except Exception as error:  # of whatever a method of one's own does
            raise ExpertError(
                f"torch.export cannot record the forward pass as one graph: {_first_line(error)}. A graph cannot "
                "depend on values of tensors (.item(), .tolist(), bool) or on len(batch); use batch.shape[0]."
            ) from error
        try:
            program: Any = torch.onnx.export(
                recorded,
                (),
                dynamic_shapes=shapes,
                input_names=[INPUT],
                output_names=list(outputs),
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
            what = f"ONNX has no operator for {operator[1]}" if operator else _first_line(error)
            raise ExpertError(
                f"{what}, so that this model cannot be a graph. Choose another router or method, or use torch.export."
            ) from error
        # Transposed weights are no larger, and only constants can be quantised.
        fold_constants(program.model, should_fold=_is_transposed, input_size_limit=MOST, output_size_limit=MOST)
    RemoveUnusedNodesPass()(program.model)
    for node in program.model.graph.all_nodes():  # paths of this machine among them
        for name in [*node.metadata_props]:
            if name != "namespace":
                del node.metadata_props[name]
    program.save(path)


def open_graph(path: Path) -> "InferenceSession":
    """An ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_graph(session: "InferenceSession", pixels: torch.Tensor) -> list[np.ndarray]:
    """Outputs of a graph for a batch of normalised images."""
    return session.run(None, {INPUT: pixels.float().cpu().numpy()})


@torch.no_grad()
def difference(session: "InferenceSession", module: torch.nn.Module, pixels: torch.Tensor) -> float:
    """How far the logits of a graph are from those of its module, relative to the largest, or to 1.

    Returns:
        `float`: Infinity if one knows classes that the other does not, or if a further output differs at all.
    """
    wanted, *others = (tensor.cpu().numpy() for tensor in module(pixels))
    found, *further = run_graph(session, pixels)
    known = np.isfinite(wanted)
    same = all(np.array_equal(one, other) for one, other in zip(others, further, strict=True))
    if not same or not np.array_equal(known, np.isfinite(found)):
        return np.inf
    return float(np.abs(wanted[known] - found[known]).max() / max(1.0, np.abs(wanted[known]).max()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _is_transposed(node: Any) -> bool | None:
    return True if node.op_type == "Transpose" else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
