"""SLCA: one adapter that learns slowly, and a head aligned on Gaussians of all classes (arXiv 2303.05118).

accelerate launch --quiet recipes/slca.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/slca.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("slca")
