"""L2L: a pool of LoRA adapters; every image selects those with the nearest keys (arXiv 2406.03216).

accelerate launch --quiet recipes/l2l.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/l2l.py --benchmark digits   # offline, on what comes with the package
"""

from dataclasses import dataclass, field

from hf_clpeft import l2l
from hf_clpeft.training.options import PoolArguments
from hf_clpeft.training.recipe import run_recipe


@dataclass
class L2LArguments(PoolArguments):
    r: int = field(default=1, metadata={"help": "Rank of the LoRA adapters."})


if __name__ == "__main__":
    run_recipe(L2LArguments, l2l)
