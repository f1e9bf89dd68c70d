"""EASE: the experts of all tasks read every image, class means classify it (arXiv 2403.12030).

accelerate launch --quiet recipes/ease.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/ease.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("ease")
