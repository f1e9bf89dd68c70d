"""S-LoRA++: S-LoRA whose query features are taken with the first task's adapter (arXiv 2406.03216).

accelerate launch --quiet recipes/s_lora_pp.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_lora_pp.py --benchmark digits   # offline, on what comes with the package
"""

from dataclasses import dataclass, field

from hf_clpeft import s_lora_pp
from hf_clpeft.training.options import PrototypeArguments
from hf_clpeft.training.recipe import run_recipe


@dataclass
class SLoraPPArguments(PrototypeArguments):
    r: int = field(default=1, metadata={"help": "Rank of the LoRA adapters."})


if __name__ == "__main__":
    run_recipe(SLoraPPArguments, s_lora_pp)
