"""A PEFT technique that no recipe has: experts that turn weights by Householder reflections (HRA, arXiv 2405.17484).

python recipes/tutorials/new_technique.py --benchmark digits

Any technique in `hf_clpeft.config.adapters.TECHNIQUES` takes the same place.
"""

from dataclasses import dataclass, field

from hf_clpeft import MethodConfig
from hf_clpeft.training.options import PrototypeArguments
from hf_clpeft.training.recipe import run_recipe


@dataclass
class SHraArguments(PrototypeArguments):
    r: int = field(default=4, metadata={"help": "Number of reflections."})


def s_hra(r: int, **options) -> MethodConfig:
    return MethodConfig("s_hra", {"peft_type": "HRA", "r": r}, **options)


if __name__ == "__main__":
    run_recipe(SHraArguments, s_hra)
