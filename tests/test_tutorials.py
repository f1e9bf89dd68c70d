"""The tutorials, followed from a folder of pictures to a combined model on the Hub; and what they add is found."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import BACKBONE, pictures
from safetensors.torch import load_file

from hf_clpeft import BENCHMARKS, METHODS, ROUTERS, ConfigError, ContinualModel, load_benchmark
from hf_clpeft.config.method import OPTIONS


TUTORIALS = Path(__file__).parents[1] / "recipes" / "tutorials"
QUICK = ["--num_train_epochs", "1", "--max_train_samples_per_task", "48", "--max_test_samples_per_task", "16"]
REGISTRIES = (ROUTERS, BENCHMARKS, METHODS, OPTIONS)
ADDED = ("variance", "digits_at_dusk", "s_hra", "mean_lora")


@pytest.fixture
def follow(monkeypatch):
    """Runs a tutorial as a user does. What it adds to the library is gone afterwards."""
    for registry in REGISTRIES:
        for name in ADDED:
            monkeypatch.delitem(registry, name, raising=False)  # which puts the registry back at the end

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            return runpy.run_path(str(TUTORIALS / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code

    yield run
    for registry in REGISTRIES:
        for name in ADDED:
            registry.pop(name, None)


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


COMPARISON = f"""
imports: [{TUTORIALS / "new_method.py"}]
seeds: [0]
options: {{num_train_epochs: 1}}
benchmarks: {{digits: {{num_tasks: 2, max_train_samples_per_task: 32, max_test_samples_per_task: 12}}}}
methods: {{mean_lora: {{r: 1}}, ncm: {{}}}}
"""


def test_a_new_method_is_one_file_that_is_trained_saved_loaded_pushed_shown_and_compared(me, follow):
    from hf_clpeft.comparing import CompareArguments, make_table, plan, read_config, run_all
    from hf_clpeft.demo import build_demo

    follow("new_method.py", "--benchmark", "digits", "--push_to_hub", "--hub_model_id", "me/means", *QUICK)
    report = json.loads(Path("out/metrics.json").read_text())
    assert report["summary"]["average_accuracy"] > 0.5 and report["summary"]["routing_accuracy"] > 0.7
    assert len(set(report["expert_parameters"])) == 1 and report["expert_parameters"][0] == 6144
    assert json.loads(Path("out/config.json").read_text())["method"] == {"name": "mean_lora", "r": 2}
    assert set(load_file("out/method.safetensors")) == {"means", "weights", "owners", "labels"}
    assert "mean_lora" in Path("out/README.md").read_text()
    assert list(me.repo("me/means").tags) == [f"task-00{i}" for i in range(5)]

    here, there = ContinualModel.from_pretrained("out"), ContinualModel.from_pretrained("me/means")
    images = [image for task in load_benchmark("digits", max_test_samples_per_task=8) for image, *_ in task.test]
    said = here.predict(images)
    assert [found.label for found in said] == [found.label for found in there.predict(images)]
    assert {found.expert for found in said} == {f"task-00{i}" for i in range(5)}
    assert "means" in str(build_demo("me/means").get_config_file())

    Path("table.yaml").write_text(COMPARISON)
    rows = run_all(plan(args := CompareArguments("table.yaml"), read_config(args.config)), Path("table.csv"), 1)
    assert [row["trained_parameters"] for row in rows] == [2 * 3072, 0] and "| mean_lora |" in make_table(rows)
    for registry in (METHODS, OPTIONS):
        del registry["mean_lora"]  # as on a machine that does not have it
    with pytest.raises(ConfigError, match="There is no method 'mean_lora'.*import the file that defines it first"):
        ContinualModel.from_pretrained("out")


def test_tutorials_use_public_names_alone():
    for path in TUTORIALS.glob("*.py"):
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        modules = {node.module for node in found if node.module.startswith("hf_clpeft")}
        assert modules <= {"hf_clpeft", "hf_clpeft.cli.run"}, path


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
