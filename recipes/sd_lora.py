"""SD-LoRA: directions of old updates are frozen, their magnitudes go on learning (arXiv 2501.13198).

accelerate launch --quiet recipes/sd_lora.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/sd_lora.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("sd_lora")
