"""Recipes as a user starts them: options, files of options, and what is said without a network."""

import csv
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import shallowing
from serving import systems_of
from throughput import Setting, make_backbone, random_experts

from hf_clpeft import METHODS, ConfigError, ContinualTrainingArguments, load_benchmark as load
from hf_clpeft.reports.report import PLOT_NAME
from hf_clpeft.training.options import BackboneArguments, StreamArguments, parse
from hf_clpeft.training.recipe import resuming_command


pytestmark = pytest.mark.usefixtures("shallow")
REPO = Path(__file__).parents[1]
GROUPS = (StreamArguments, BackboneArguments, ContinualTrainingArguments)
QUICK = ["--num_train_epochs", "1", "--max_train_samples_per_task", "32", "--max_test_samples_per_task", "16"]


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Runs a recipe in this process; gives what it has printed."""

    def run_here(script, *options):
        monkeypatch.setattr(sys, "argv", [str(REPO / "recipes" / script), *map(str, options)])
        try:
            runpy.run_path(str(REPO / "recipes" / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        return capfd.readouterr().out

    return run_here


NAMED = sorted(path.stem for path in (REPO / "recipes").glob("*.py") if path.stem in METHODS)
CONTROLS = re.findall(r'"(\w+)"', (REPO / "recipes" / "control.py").read_text().partition("run_recipe(")[2])
SMALL = {"projection_size": 64, "kernel_features": 64}  # of those that have it
DEEP = [name for name in NAMED + CONTROLS if len(getattr(METHODS[name].Config(), "query_layers", None) or []) > 2]


def test_every_method_has_a_recipe():
    """The general forms, for any PEFT technique or router, are those of the methods that have names of their own."""
    general = {name for name, kind in METHODS.items() if "peft" in {f.name for f in fields(kind.Config)}}
    package = {name for name, kind in METHODS.items() if kind.__module__.startswith("hf_clpeft.")}
    assert {*NAMED, *CONTROLS} == package - general - {"closed_form"}


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("name", [*NAMED, *CONTROLS])
def test_a_recipe_learns_two_tasks(name, monkeypatch, run_here):
    script = f"{name}.py" if name in NAMED else "control.py"
    options = ["--benchmark", "digits", "--output_dir", "out", "--num_tasks", "5", "--disable_tqdm", *QUICK]
    options += [] if name in NAMED else ["--method", name]
    for option in {f.name for f in fields(METHODS[name].Config)} & SMALL.keys():
        options += [f"--{option}", str(SMALL[option])]
    monkeypatch.setattr("hf_clpeft.training.options.load_benchmark", lambda *args, **more: load(*args, **more)[:2])
    with shallowing(None if name in DEEP else 2):
        assert re.search(rf"{name} +\d+\.\d", run_here(script, *options))
    assert Path("out", PLOT_NAME).read_bytes()[:4] == b"\x89PNG"
    text = (REPO / "recipes" / script).read_text()
    assert name not in NAMED or (METHODS[name].paper or "") in text and f"recipes/{script} --benchmark digits" in text


def test_the_demo_ends_with_a_table_and_a_picture_and_may_be_run_again(tmp_path, run_here):
    options = ["--output_dir", str(tmp_path), "--num_tasks", "2", "--disable_tqdm", *QUICK]
    printed = run_here("demo.py", *options)
    assert all(f"\n{name} " in printed for name in ("s_lora", "s_prompts", "sequential_lora"))
    assert (tmp_path / "demo.png").is_file() and str(tmp_path / "demo.png") in printed
    assert "next: hf-clpeft demo" in run_here("demo.py", *options)
    (tmp_path / "demo.png").unlink()  # what is there may be anybody's then
    with pytest.raises(SystemExit, match="error: .*s_lora holds another model"):
        run_here("demo.py", *options)


def test_under_a_quiet_launcher_no_traceback_follows_a_line(monkeypatch):
    script = str(REPO / "recipes" / "s_lora.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", script, "--r", "-3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = [line for line in done.stderr.splitlines() if "--num_" not in line and "accelerate launch" not in line]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said[-1] == "error: r=-3 must be a whole number from 1 to 4,096.", done.stderr
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(sys, "argv", ["recipes/s_lora.py", "--output_dir", "my model", "--overwrite_output_dir"])
    assert resuming_command() == (
        "accelerate launch --quiet recipes/s_lora.py --output_dir 'my model' --resume_from_checkpoint auto"
    )


def test_a_digits_model_is_pushed_task_by_task_and_a_refusal_ends_it(hub, run_here, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    options = ["--method", "aper", "--recipe-options", " ".join(QUICK)]  # it trains on one task only
    printed = run_here("publish_digits.py", "alice", *options)
    assert re.search(r"aper +\d+\.\d", printed), printed
    assert sorted(hub.repo("alice/aper-digits").tags) == [f"task-00{i}" for i in range(5)]
    assert 'from_pretrained("alice/aper-digits")' in Path("out/digits_models/aper-digits/README.md").read_text()
    with pytest.raises(SystemExit) as end:
        run_here("publish_digits.py", "bob", "--method", "l2p", *options[2:])
    said = capfd.readouterr().err
    assert end.value.code == 1 and "error: " in said and "Traceback" not in said


def test_throughput_of_every_system_is_measured(tmp_path, run_here, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # of this process
    options = ["--num_experts", "1", "3", "--batch_sizes", "2", "--repeats", "1", "--warmup", "1", "--threads", "1"]
    run_here("throughput.py", "--output_dir", tmp_path, *options)
    with (tmp_path / "throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    systems = {row["system"] for row in rows if row["mode"] == "predict" and row["technique"] == "lora"}
    assert systems == {"backbone", "PEFT, adapter_names=", "PEFT, one adapter at a time"} | {
        f"bank, {form}" for form in ("stacked", "gathered", "grouped")
    }
    assert all(float(row["images_per_second"]) > 0 for row in rows) and (tmp_path / "throughput.png").is_file()


def test_latency_of_every_system_is_measured(tmp_path, run_here):
    options = ["--num_experts", "2", "3", "--clients", "1", "4", "--requests", "6", "--rounds", "2"]
    run_here("serving.py", "--output_dir", tmp_path, *options, "--max_single_experts", "2")
    with (tmp_path / "serving.csv").open() as file:
        rows = list(csv.DictReader(file))
    singles = ["PEFT, adapter_names=", "PEFT, one adapter at a time", "merged, swapped in"]
    assert [row["system"] for row in rows] == 2 * ["bank", *singles] + 2 * ["bank"]
    assert all(float(row["p99_ms"]) >= float(row["p50_ms"]) > 0 and row["requests"] == "6" for row in rows)


def test_every_served_system_gives_the_same_features():
    backbone = make_backbone("tiny")
    experts = random_experts(backbone, Setting("predict", "lora", 2, 3, 1, "float32", "off"), 3)
    requests = [(torch.randn(3, 64, 64), expert) for expert in (2, 0, 1, 2)]
    with torch.no_grad():
        first, *others = (system(requests) for system in systems_of(backbone, experts, singles=True).values())
    assert len(others) == 3
    for features in others:
        torch.testing.assert_close(features, first, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_gradient_checkpointing_takes_less_memory_in_the_recipe(tmp_path):
    options = ["--output_dir", str(tmp_path), "--num_experts", "2", "--batch_size", "128", "--only", "train"]
    code = "import runpy, sys; script, *options = sys.argv[1:]\n"  # another process, as this one has memory to spare
    code += "for checkpointing in ('off', 'on'):\n"
    code += "    sys.argv = [script, *options, 'S-X: one expert', checkpointing]\n"
    code += "    runpy.run_path(script, run_name='__main__')\n"
    command = [sys.executable, "-c", code, str(REPO / "recipes" / "memory.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "recipes")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "memory.csv").open() as file:
        peaks = [float(row["peak_mb"]) for row in csv.DictReader(file)]
    assert len(peaks) == 2 and 0 < peaks[1] < peaks[0]


def test_every_option_has_a_help_text(run_here):
    printed = run_here("s_lora.py", "--help")
    for option in ("--r R", "--k K", "--learning_rate", "--benchmark", "--image_size", "--config"):
        assert option in printed


def test_the_command_line_wins_over_the_file_and_the_file_over_the_benchmark(tmp_path):
    (tmp_path / "options.yaml").write_text("benchmark: digits\nlearning_rate: 0.5\nseed: 7\n")
    stream, backbone, training = parse(GROUPS, ["--config", str(tmp_path / "options.yaml"), "--seed", "8"])
    assert (training.learning_rate, training.seed) == (0.5, 8)
    assert backbone.backbone == "hf-clpeft/vit-tiny-glyphs"  # what suits the benchmark
    assert stream.benchmark == "digits"


def test_the_default_is_the_papers_set_up():
    stream, backbone, _ = parse(GROUPS, [])
    assert stream.benchmark == "split_cifar100" and backbone.backbone == "google/vit-base-patch16-224-in21k"


def test_a_data_set_alone_is_no_benchmark():
    stream, _, _ = parse(GROUPS, ["--dataset", "my/pictures", "--scenario", "domain"])
    assert stream.benchmark is None


@pytest.mark.parametrize(
    "text, message", [("lerning_rate: 1", "no option 'lerning_rate'"), ("benchmark: mnist", "'mnist'")]
)
def test_unknown_options_and_benchmarks_are_refused(tmp_path, text, message):
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse(GROUPS, ["--config", str(tmp_path / "options.yaml")])


def test_without_a_network_the_default_ends_in_one_line_with_the_offline_command():
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, str(REPO / "recipes" / "s_lora.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "uoft-cs/cifar100 and google/vit-base-patch16-224-in21k must come from" in done.stderr
    assert "s_lora.py --benchmark digits" in done.stderr
