"""What the README shows runs as it stands there."""

import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from hub_server import User

from hf_clpeft import METHODS, load_benchmark
from hf_clpeft.streams.digits import load_digits_dataset


REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def me(hub, learnt, monkeypatch):
    """The reader: logged in, and the owner of what the README has pushed before."""
    monkeypatch.setitem(hub.users, "hf_me", User("me", ["me"]))
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    learnt.model.push_to_hub("me/digits")
    hub.repo("me/digits").set_ref("refs/tags/task-001", "main")


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
@pytest.mark.parametrize("snippet", re.findall(r"```py\n(.*?)```", README, re.DOTALL))
def test_a_snippet_runs(me, snippet, request, monkeypatch):
    few = partial(load_benchmark, max_train_samples_per_task=32, max_test_samples_per_task=16)
    monkeypatch.setattr("hf_clpeft.load_benchmark", few)
    load_digits_dataset()["test"][0]["image"].save("digit.png")
    if "127.0.0.1:7860" in snippet:  # where the demo is
        snippet = snippet.replace("http://127.0.0.1:7860", request.getfixturevalue("page"))
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_readme_names_no_file_that_is_not_there():
    for path in re.findall(r"`((?:recipes|hf_clpeft)/[\w/.]+)`", README):
        assert (REPO / path).exists(), path


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stands_in_the_docs(name):
    kind = METHODS[name]
    if "peft" in {option.name for option in fields(kind.Config)} or not kind.__module__.startswith("hf_clpeft."):
        return  # the general form of others, or one that a test defines
    assert f"`{name}`" in (REPO / "docs" / "methods.md").read_text(encoding="utf-8")
    section = README.partition("## Methods")[2].partition("\n## ")[0]
    assert name == "closed_form" or kind.title.partition(",")[0].lower() in section.lower()


def test_the_commands_at_the_top_are_the_ones_that_ci_runs():
    assert "make demo" in README.split("```")[1] and "make test" in README.split("```")[1]
    assert "make test" in (REPO / ".ci" / "run").read_text()


def test_the_commands_and_options_that_the_readme_shows_exist():
    from dataclasses import fields

    from hf_clpeft import ContinualTrainingArguments, cli

    commands = {command.callback.__name__ for command in cli.app.registered_commands}
    assert set(re.findall(r"hf-clpeft (\w+)", README)) <= commands
    assert {"push_to_hub", "hub_model_id", "resume_from_checkpoint"} <= {
        f.name for f in fields(ContinualTrainingArguments)
    }
