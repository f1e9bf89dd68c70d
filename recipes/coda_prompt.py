"""CODA-Prompt: prefixes of every image's own, mixed from components of all tasks (arXiv 2211.13218).

accelerate launch --quiet recipes/coda_prompt.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/coda_prompt.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("coda_prompt")
