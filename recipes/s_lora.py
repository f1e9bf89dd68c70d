"""S-LoRA: one LoRA adapter per task, chosen by the nearest k-means prototype (arXiv 2406.03216).

accelerate launch --quiet recipes/s_lora.py                      # the paper's set-up: ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_lora.py --benchmark digits   # offline, on what comes with the package
"""

from dataclasses import dataclass, field

from hf_clpeft import s_lora
from hf_clpeft.training.options import PrototypeArguments
from hf_clpeft.training.recipe import run_recipe


@dataclass
class SLoraArguments(PrototypeArguments):
    r: int = field(default=1, metadata={"help": "Rank of the LoRA adapters."})


if __name__ == "__main__":
    run_recipe(SLoraArguments, s_lora)
