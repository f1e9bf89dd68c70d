"""DualPrompt: general prefixes, and the expert prefix of the task with the nearest key (arXiv 2204.04799).

accelerate launch --quiet recipes/dualprompt.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/dualprompt.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("dualprompt")
