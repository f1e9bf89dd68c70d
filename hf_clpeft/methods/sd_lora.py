"""SD-LoRA: the directions of old LoRA updates are frozen, their magnitudes go on learning."""

import torch

from ..config import TaskConfig
from ..experts.lora import LoraTable
from .learning import FeaturesOf
from .sums import LoraSum


SMALLEST_NORM = 1e-12  # of an update that is divided by its norm


class SdLora(LoraSum, name="sd_lora"):
    """SD-LoRA, scalable decoupled LoRA: W + Σ αᵢ BᵢAᵢ / ‖BᵢAᵢ‖; arXiv 2501.13198.

    **Trains** the adapter of a task, the magnitude α of every earlier update in every layer, and the head rows of the
    task's classes. **Stores** an adapter per task, scaled to its current magnitude, and the head. **Costs** one
    forward pass per image.

    What differs from the authors' code, and why:

    - The rank is 1, as in our other methods; theirs is 10. As `lora_alpha` is the rank, an optimizer step changes an
      update of rank 10 ten times as much, and `learning_rate` should be a tenth.
    - The magnitudes are one for each layer, as the formula is for one layer; there, all layers share one.
    - They go on from what was learnt, and norms are those of BA. There, they start at 0.8 in every task, divided by
      ‖B‖ ‖A‖, which changes the model before its first step.
    - The update of the current task has no magnitude of its own while it is trained, as its B has one already.
    - The variants that reduce the rank or merge similar directions are left out.
    """

    title, paper = "SD-LoRA", "2501.13198"

    def begin(self, task: TaskConfig) -> None:
        super().begin(task)
        if isinstance(self.bank.table, LoraTable):
            self._norms = self.bank.table.norms()
            self._magnitudes = torch.nn.Parameter(self._norms.clone())

    def factors(self) -> torch.Tensor | None:
        # Experts are stored with their magnitudes, so that α / ‖BA‖ is what the stored update is multiplied by.
        return self._magnitudes / self._norms.clamp(min=SMALLEST_NORM) if len(self.bank) else None

    def end(self, features_of: FeaturesOf) -> None:
        factors = self.factors()
        if factors is not None:
            self.bank.rescale(factors)
            del self._magnitudes, self._norms
        super().end(features_of)
