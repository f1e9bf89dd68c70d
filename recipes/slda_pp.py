"""SLDA++: linear discriminant analysis over many views and several depths, after one expert (on arXiv 1909.01520).

accelerate launch --quiet recipes/slda_pp.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/slda_pp.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("slda_pp")
