"""What a run tells experiment trackers: losses, metrics, and a picture of the accuracy matrix after every task."""

import io

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..reports.plots import plot_report
from ..reports.report import StreamReport
from .arguments import ContinualTrainingArguments


PICTURE = "eval/accuracy_and_routing"


class Trackers:
    """The trackers of `report_to`, through Accelerate.

    Args:
        accelerator (`accelerate.Accelerator`): Made with `log_with`.
        args ([`ContinualTrainingArguments`]): Which tracker, and the name of the run.
    """

    def __init__(self, accelerator: Accelerator, args: ContinualTrainingArguments):
        self._accelerator, self._used = accelerator, args.report_to != "none"
        if self._used:
            accelerator.init_trackers(args.run_name, config=args.to_log())

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers by name."""
        self._accelerator.log(values, step=step)

    def show(self, report: StreamReport, step: int) -> None:
        """Logs the picture of a report, to trackers that take pictures."""
        if not self._used or not self._accelerator.is_main_process:
            return
        takers = [tracker for tracker in self._accelerator.trackers if hasattr(tracker, "log_images")]
        picture = picture_of(report)[None] if takers else None
        for tracker in takers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({PICTURE: picture}, step=step, **options)

    def close(self) -> None:
        """Waits until everything is written."""
        if self._used:
            self._accelerator.end_training()


def picture_of(report: StreamReport) -> np.ndarray:
    """Accuracy matrix and routing of a report, as pixels of shape `(height, width, 3)`.

    Example:

    ```py
    >>> from hf_clpeft import StreamReport
    >>> from hf_clpeft.training.trackers import picture_of

    >>> report = StreamReport("s_lora", "pets", environment={})
    >>> report.add_task("task-000", "cats")
    >>> picture_of(report).shape[2]
    3

    ```
    """
    file = io.BytesIO()
    plot_report(report.accuracy_matrix, report.routing_confusion, report.titles, report.experts, file, report.method)
    return np.asarray(Image.open(file).convert("RGB"))
