"""S-Prompts++: S-Prompts whose query features are taken with the first task's prompt (arXiv 2406.03216).

accelerate launch --quiet recipes/s_prompts_pp.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_prompts_pp.py --benchmark digits   # offline, on what comes with the package
"""

from dataclasses import dataclass, field

from hf_clpeft import s_prompts_pp
from hf_clpeft.training.options import PrototypeArguments
from hf_clpeft.training.recipe import run_recipe


@dataclass
class SPromptsPPArguments(PrototypeArguments):
    prompt_length: int = field(default=10, metadata={"help": "Prompt tokens behind [CLS]."})


if __name__ == "__main__":
    run_recipe(SPromptsPPArguments, s_prompts_pp)
