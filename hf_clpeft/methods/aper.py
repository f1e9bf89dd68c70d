"""APER: frozen features and those with the first task's expert side by side, classified by class means."""

from dataclasses import dataclass

import torch

from .closed_form import FirstExpert
from .options import LoraOptions
from .views import ViewOptions


class Aper(FirstExpert, name="aper"):
    """APER, also called ADAM: class means of frozen features and of those with the first task's expert, side by side.

    **Trains** an adapter on the first task, with a temporary head. **Stores** it, and a mean per class and task.
    **Costs** two forward passes per image.

    As in [`Ncm`], which is the paper's SimpleCIL, class means are those of L2-normalised features, where the paper
    normalises the means alone. Without the frozen features, it is `closed_form_first` with `router="class_means"`.
    """

    title, paper, which_router = "APER", "2303.07338", "class_means"
    experts = "one PEFT expert that the first of them trained, beside the frozen backbone"

    @dataclass
    class Config(ViewOptions, LoraOptions):
        pass

    @property
    def query_size(self) -> int:
        return 2 * super().query_size

    @property
    def query_passes(self) -> int:  # type: ignore[override]
        return 2 * super().query_passes

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.bank.frozen(pixels, self._cut).float(), super().look(pixels)], dim=1)
