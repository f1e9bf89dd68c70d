"""S-LoRA-Mix: one LoRA adapter per task; a Gaussian router, and the likeliest experts judge every image together.

accelerate launch --quiet recipes/s_lora_mix.py                      # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/s_lora_mix.py --benchmark digits   # offline, on what comes with the package
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe("s_lora_mix")
