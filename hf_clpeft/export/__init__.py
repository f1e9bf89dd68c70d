"""Exports for use without this library: PEFT adapters, classifiers of `transformers`, and ONNX graphs."""

from .adapter import export_adapter
from .merged import export_merged
from .onnx import export_onnx


__all__ = ["export_adapter", "export_merged", "export_onnx"]
