"""The comparison: one file in, a table out, and nothing measured twice."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest


REPO = Path(__file__).parents[1]
sys.path.append(str(REPO / "recipes"))
CONFIG = """
seeds: [0, 1]
options: {num_train_epochs: 2}
benchmarks:
  digits: {num_tasks: 2, max_train_samples_per_task: 64, max_test_samples_per_task: 24}
methods:
  s_lora: {}
  "s_lora, gaussian": {method: s_lora, router: gaussian, experts_from: s_lora}
  linear_probe: {}
"""


def run(*options):
    command = [sys.executable, str(REPO / "recipes" / "compare.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def test_a_table_is_finished_by_the_command_that_began_it(config, tmp_path):
    first = run("--config", config, "--num_workers", 2, "--seeds", 0)
    assert first.returncode == 0, first.stderr[-2000:]
    done = run("--config", config)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 runs, of which 3 stand in out/tiny/results.csv already" in done.stdout
    with open("out/tiny/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        (name, str(seed)) for name in ("linear_probe", "s_lora", "s_lora, gaussian") for seed in (0, 1)
    ]
    for row in rows:
        assert 0.5 < float(row["average_accuracy"]) <= 1 and len(row["weight_hash"]) == 64
        assert int(row["images_seen"]) == (0 if row["method"] == "linear_probe" else 256)
        assert len(json.loads(row["accuracy_matrix"])) == 2 and "torch" in json.loads(row["versions"])
    table = Path("out/tiny/results.md").read_text()
    assert table.index("| s_lora |") < table.index("| s_lora, gaussian |") < table.index("| linear_probe |")
    assert " ± " in table
    for what in ("curves", "parameters", "routing", "matrix_digits"):
        assert Path(f"out/tiny/results_{what}.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_that_were_measured_with_other_options_are_not_passed_off(config, tmp_path):
    from compare import CompareArguments, check_same, plan

    from hf_clpeft import ConfigError

    runs = plan(CompareArguments(str(config)))
    row = {"options": json.dumps({**runs[0].options, "num_train_epochs": 5})}
    with pytest.raises(ConfigError, match="with num_train_epochs=5, not 2. Delete that row"):
        check_same(runs[0], row, tmp_path / "results.csv")


@pytest.mark.parametrize(
    "text, message",
    [
        ("methods: {ncm: {}}", r"it lacks \['benchmarks'\]"),
        ("benchmarks: {mnist: {}}\nmethods: {ncm: {}}", "no benchmark 'mnist'"),
        ("benchmarks: {digits: {}}\nmethods: {knn: {}}", "no method 'knn'"),
        (
            "benchmarks: {digits: {}}\nmethods: {ncm: {n: 3}}",
            "ncm on digits: there is no option 'n'",
        ),
        (
            "benchmarks: {digits: {}}\nmethods: {s_lora_pp: {experts_from: s_lora}}",
            "s_lora, which is not among the runs",
        ),
    ],
)
def test_a_file_that_cannot_work_is_refused_before_anything_is_learnt(text, message, tmp_path):
    from compare import CompareArguments, plan, run_all

    from hf_clpeft import ConfigError

    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        run_all(plan(CompareArguments(str(tmp_path / "wrong.yaml"))), tmp_path / "results.csv", 1)


def test_every_file_of_the_repo_can_be_planned():
    from compare import CompareArguments, chains_of, plan

    paths = [*(REPO / "recipes" / "configs").rglob("*.yaml")]
    assert len(paths) > 1
    for path in paths:
        assert chains_of(plan(CompareArguments(str(path))), {})
