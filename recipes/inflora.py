"""InfLoRA: every task's update is orthogonal to the inputs of those before (arXiv 2404.00228).

accelerate launch --quiet recipes/inflora.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/inflora.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("inflora")
