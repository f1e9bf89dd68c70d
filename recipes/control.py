"""What to compare with: closed forms on frozen features, and one adapter trained in turn or on everything at once.

accelerate launch --quiet recipes/control.py --method slda                    # ViT-B/16, Split CIFAR-100
accelerate launch --quiet recipes/control.py --method ncm --benchmark digits  # offline, on what comes with the package
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_clpeft import METHODS, MethodConfig
from hf_clpeft.training.recipe import run_recipe


@dataclass
class ControlArguments:
    method: Literal["ncm", "slda", "ranpac", "ranpac_first", "linear_probe", "sequential_lora", "joint_lora"] = field(
        default="slda", metadata={"help": "Which control; see hf_clpeft.methods."}
    )
    projection_size: int | None = field(default=None, metadata={"help": "Random features of RanPAC; default: 10,000."})


def control(method: str, projection_size: int | None) -> MethodConfig:
    return METHODS[method](**({} if projection_size is None else {"projection_size": projection_size}))


if __name__ == "__main__":
    run_recipe(ControlArguments, control)
