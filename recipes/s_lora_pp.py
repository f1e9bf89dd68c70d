"""S-LoRA++: S-LoRA whose query features are taken with the first task's adapter (arXiv 2406.03216).

accelerate launch --quiet recipes/s_lora_pp.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_lora_pp.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("s_lora_pp")
