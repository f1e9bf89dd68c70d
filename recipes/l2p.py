"""L2P: a pool of prompts; every image selects those with the nearest keys (arXiv 2112.08654).

accelerate launch --quiet recipes/l2p.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/l2p.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("l2p")
