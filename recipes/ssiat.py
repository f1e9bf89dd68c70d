"""SSIAT: one adapter that all tasks tune, whose drift class means and head follow (arXiv 2403.19979).

accelerate launch --quiet recipes/ssiat.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/ssiat.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("ssiat")
