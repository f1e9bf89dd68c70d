"""The digits models: every method's recipe, run on the bundled benchmark, and pushed.

python recipes/publish_digits.py me                                # me/s-lora-digits, ...: one commit and tag a task
python recipes/publish_digits.py --output-dir hf_clpeft/assets     # pushes nothing: how those in the package were made

What is there already is not learnt again. Minutes, on a CPU.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_clpeft import METHODS
from hf_clpeft.cli.run import run_program
from hf_clpeft.reports.card import CARD_NAME, make_card_of


RECIPES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem in METHODS)


def main(
    namespace: Annotated[str | None, typer.Argument(help="Whose repos to push to; none: nothing is pushed.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("out/digits_models"),
    method: Annotated[list[str], typer.Option(help="Only this method; may be given several times.")] = RECIPES,
    recipe_options: Annotated[str, typer.Option(help="Further options of the recipes, as one text.")] = "",
):
    for recipe in method:
        name = f"{recipe.replace('_', '-')}-digits"
        folder, repo_id = output_dir / name, f"{namespace or 'hf-clpeft'}/{name}"
        script = Path(__file__).with_name(f"{recipe}.py")
        options = ["--benchmark", "digits", "--output_dir", folder, "--resume_from_checkpoint", "auto"]
        options += shlex.split(recipe_options)
        if namespace is not None:
            options += ["--push_to_hub", "--hub_model_id", repo_id]
        ended = subprocess.run([sys.executable, script, *options]).returncode
        if ended:
            raise SystemExit(ended)  # it has said why
        make_card_of(folder, repo_id).save(folder / CARD_NAME)  # for who has the folder, and looks for the repo


if __name__ == "__main__":
    run_program(main)
