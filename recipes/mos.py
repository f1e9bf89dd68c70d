"""MOS: an image hops to the expert of the class it seems to be, class means have a say (arXiv 2412.09441).

accelerate launch --quiet recipes/mos.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/mos.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("mos")
