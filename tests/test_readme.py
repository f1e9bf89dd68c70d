"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

from hf_clpeft.streams.digits import load_digits_dataset


REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("snippet", re.findall(r"```py\n(.*?)```", README, re.DOTALL))
def test_a_snippet_runs(snippet):
    load_digits_dataset()["test"][0]["image"].save("digit.png")
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_readme_names_no_file_that_is_not_there():
    for path in re.findall(r"`((?:recipes|hf_clpeft)/[\w/.]+)`", README):
        assert (REPO / path).exists(), path


def test_the_commands_at_the_top_are_the_ones_that_ci_runs():
    assert "make demo" in README.split("```")[1] and "make test" in README.split("```")[1]
    assert "make test" in (REPO / ".ci" / "run").read_text()
