"""The tutorials, followed from a folder of pictures to a combined model on the Hub; and what they add is found."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import BACKBONE, pattern_rows
from hub_server import User

from hf_clpeft import ConfigError, ContinualModel
from hf_clpeft.routing import ROUTERS
from hf_clpeft.streams import BENCHMARKS


TUTORIALS = Path(__file__).parents[1] / "recipes" / "tutorials"
QUICK = ["--num_train_epochs", "1", "--max_train_samples_per_task", "48", "--max_test_samples_per_task", "16"]


@pytest.fixture
def follow(monkeypatch):
    """Runs a tutorial as a user does. What it adds to the library is gone afterwards."""
    for registry in (ROUTERS, BENCHMARKS):
        for name in ("variance", "digits_at_dusk"):
            monkeypatch.delitem(registry, name, raising=False)  # which puts the registry back at the end

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            return runpy.run_path(str(TUTORIALS / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code

    yield run
    for registry in (ROUTERS, BENCHMARKS):
        for name in ("variance", "digits_at_dusk"):
            registry.pop(name, None)


@pytest.fixture
def me(hub, monkeypatch):
    monkeypatch.setitem(hub.users, "hf_me", User("me", ["me"]))
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    return hub


def pictures(folder, classes, per_class=12):
    """A folder of pictures, as anybody has: a folder for each class."""
    rows = pattern_rows(num_classes=4, per_class=per_class)
    for number, (image, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
        if label in classes:
            path = Path(folder, f"bird {label}", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


def test_own_pictures_a_class_more_and_two_models_in_one(me, follow, capsys):
    follow("own_pictures.py", pictures("pictures", [0, 1]), "me/birds", "--backbone", BACKBONE)
    assert "next: hf-clpeft demo me/birds" in capsys.readouterr().out
    follow("add_classes.py", "me/birds", pictures("new", [2]), "october")
    assert "It knows bird 0, bird 1, bird 2." in capsys.readouterr().out
    repo = me.repo("me/birds")
    assert [commit.title.split(":")[0] for commit in repo.commits()[:2]] == ["Learn october", "Learn first"]
    assert list(repo.tags) == ["first", "october"]

    follow("own_pictures.py", pictures("others", [2, 3]), "me/other-birds", "--backbone", BACKBONE)
    follow("combine_two.py", "me/birds", "me/other-birds", "me/garden")
    garden = ContinualModel.from_pretrained("me/garden")
    assert garden.config.classes == ["bird 0", "bird 1", "bird 2", "bird 3"]
    files = sorted(Path("pictures").rglob("*.png"))
    labels = [found.label for found in garden.predict(files)]
    assert sum(label == path.parent.name for label, path in zip(labels, files, strict=True)) > 0.8 * len(files)


def test_a_new_technique_is_one_file(follow):
    follow("new_technique.py", "--benchmark", "digits", "--num_tasks", 2, *QUICK)
    adapter = json.loads(Path("out/experts/task-001/adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"]) == ("HRA", 4)


def test_a_new_router_is_one_file_that_saves_loads_and_has_a_card(follow):
    follow("new_router.py", "--benchmark", "digits", "--num_tasks", 5, *QUICK)
    report = json.loads(Path("out/metrics.json").read_text())
    assert report["summary"]["routing_accuracy"] > 0.8
    assert "| router | Gaussian per class, one variance per feature |" in Path("out/README.md").read_text()
    loaded = ContinualModel.from_pretrained("out")
    assert loaded.router.squares.abs().sum() > 0
    del ROUTERS["variance"]  # as on a machine that does not have it
    with pytest.raises(ConfigError, match="There is no router 'variance'; choose one of .* hf_clpeft.routing.ROUTERS"):
        ContinualModel.from_pretrained("out")


def test_a_new_benchmark_is_one_file(follow):
    follow("new_benchmark.py", *QUICK)
    report = json.loads(Path("out/metrics.json").read_text())
    assert (report["stream"], report["titles"]) == ("digits_at_dusk", ["noon", "evening", "night"])
    follow("new_benchmark.py", "--dry_run")


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.py")), ids=lambda path: path.stem)
def test_a_tutorial_is_short(path):
    assert len(path.read_text().splitlines()) <= 80
