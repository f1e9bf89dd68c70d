"""Task streams: data sets split into tasks, and named benchmarks."""

from ..backbones.pictures import PictureError, open_image
from .benchmarks import BENCHMARKS, Benchmark, load_benchmark
from .images import ImageTransform, TaskImages, cache_images
from .source import ImageSource, StreamError
from .stream import TaskStream, load_task
from .streamed import StreamedImages, open_images
from .task import Split, Task


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "ImageSource",
    "ImageTransform",
    "PictureError",
    "Split",
    "StreamError",
    "StreamedImages",
    "Task",
    "TaskImages",
    "TaskStream",
    "cache_images",
    "load_benchmark",
    "load_task",
    "open_image",
    "open_images",
]
