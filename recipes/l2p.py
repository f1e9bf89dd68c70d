"""L2P: a pool of prompts; every image selects those with the nearest keys (arXiv 2112.08654).

accelerate launch --quiet recipes/l2p.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/l2p.py --benchmark digits   # offline, on what comes with the package
"""

from dataclasses import dataclass, field

from hf_clpeft import l2p
from hf_clpeft.training.options import PoolArguments
from hf_clpeft.training.recipe import run_recipe


@dataclass
class L2PArguments(PoolArguments):
    prompt_length: int = field(default=5, metadata={"help": "Tokens of each prompt."})


if __name__ == "__main__":
    run_recipe(L2PArguments, l2p)
