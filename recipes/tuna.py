"""TUNA: the surest task's expert, together with a universal one merged from all (arXiv 2508.08165).

accelerate launch --quiet recipes/tuna.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/tuna.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("tuna")
