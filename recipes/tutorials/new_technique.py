"""A PEFT technique that no recipe has: experts that turn weights by Householder reflections (HRA, arXiv 2405.17484).

python recipes/tutorials/new_technique.py --benchmark digits

S-X takes any technique as it is: `s_x(peft={"peft_type": "HRA", "r": 4})`. This gives one a name and a default.
"""

from dataclasses import dataclass, field

from hf_clpeft import METHODS, run_recipe, s_x


class SHra(METHODS["s_x"], name="s_hra"):
    title, paper = "S-HRA", "2405.17484"

    @dataclass
    class Config(s_x):
        peft: dict = field(
            default_factory=lambda: {"peft_type": "HRA", "r": 4},
            metadata={"help": "The technique and its arguments; r is the number of reflections."},
        )


if __name__ == "__main__":
    run_recipe("s_hra")
