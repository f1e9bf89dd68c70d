"""APER: class means of frozen features beside those with the first task's expert (arXiv 2303.07338).

accelerate launch --quiet recipes/aper.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/aper.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("aper")
