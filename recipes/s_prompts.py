"""S-Prompts: one prompt per task, chosen by the nearest k-means prototype (arXiv 2207.12819).

accelerate launch --quiet recipes/s_prompts.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_prompts.py --benchmark digits   # offline, on what comes with the package
"""

from dataclasses import dataclass, field

from hf_clpeft import s_prompts
from hf_clpeft.training.options import PrototypeArguments
from hf_clpeft.training.recipe import run_recipe


@dataclass
class SPromptsArguments(PrototypeArguments):
    prompt_length: int = field(default=10, metadata={"help": "Prompt tokens behind [CLS]."})


if __name__ == "__main__":
    run_recipe(SPromptsArguments, s_prompts)
