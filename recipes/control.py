"""What to compare with: closed forms on frozen features, and one adapter trained on all tasks, in turn or as one.

accelerate launch --quiet recipes/control.py --method slda                    # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/control.py --method ncm --benchmark digits  # offline, on what comes with the package

The ceilings, which see the images of all tasks at once: --method sequential_lora --joined (joint LoRA), and
--method linear_probe --joined.
"""

from hf_clpeft import run_recipe


if __name__ == "__main__":
    run_recipe(
        "slda",
        "ncm",
        "ranpac",
        "ranpac_first",
        "loranpac",
        "loranpac_first",
        "layup",
        "layup_first",
        "klda",
        "linear_probe",
        "sequential_lora",
    )
