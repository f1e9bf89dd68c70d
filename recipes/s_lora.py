"""S-LoRA: one LoRA adapter per task, chosen by the nearest k-means prototype (arXiv 2406.03216).

accelerate launch --quiet recipes/s_lora.py                      # the paper's set-up: ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_lora.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("s_lora")
