"""S-Prompts++: S-Prompts whose query features are taken with the first task's prompt (arXiv 2406.03216).

accelerate launch --quiet recipes/s_prompts_pp.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_prompts_pp.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("s_prompts_pp")
