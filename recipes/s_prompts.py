"""S-Prompts: one prompt per task, chosen by the nearest k-means prototype (arXiv 2207.12819).

accelerate launch --quiet recipes/s_prompts.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_prompts.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("s_prompts")
