"""L2L: a pool of LoRA adapters; every image selects those with the nearest keys (arXiv 2406.03216).

accelerate launch --quiet recipes/l2l.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/l2l.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("l2l")
