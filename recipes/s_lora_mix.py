"""S-LoRA-Mix: one LoRA adapter per task; a Gaussian router, and the likeliest experts judge every image together.

accelerate launch --quiet recipes/s_lora_mix.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_lora_mix.py --benchmark digits   # offline, on what comes with the package
"""

from dataclasses import dataclass, field

from hf_clpeft import s_lora_mix
from hf_clpeft.training.recipe import run_recipe


@dataclass
class SLoraMixArguments:
    r: int = field(default=1, metadata={"help": "Rank of the LoRA adapters."})
    mix: int = field(default=3, metadata={"help": "Experts that judge an image."})
    route_layer: list[int] | None = field(
        default=None, metadata={"help": "Take query features behind these layers; default: the last two."}
    )


if __name__ == "__main__":
    run_recipe(SLoraMixArguments, s_lora_mix)
