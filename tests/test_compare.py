"""The comparison: one file in, a table out, and nothing measured twice."""

import csv
import json
import runpy
import sys
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import make_trainer, pattern_dataset, pictures, run as run_command
from sweep import draw, line_of, points_of, read_sweep

from hf_clpeft import METHODS, ConfigError, ContinualModel, TaskStream, load_benchmark, s_x
from hf_clpeft.comparing import CompareArguments, Run, draw as draw_table, make_table, plan, read_config, run_all
from hf_clpeft.comparing.plan import copy_of, read_yaml
from hf_clpeft.comparing.runs import chains_of, check_same, forwards_per_image, in_order
from hf_clpeft.comparing.tables import families_of
from hf_clpeft.reports.plots import plot_series


pytestmark = pytest.mark.usefixtures("shallow")
REPO = Path(__file__).parents[1]

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


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_two_methods_of_the_small_table_are_measured_in_two_processes(monkeypatch, capfd):
    path = Path("digits.yaml")
    config = REPO / "recipes" / "configs" / "digits.yaml"
    path.write_text(f"base: {config}\noptions: {{num_train_epochs: 1, learning_rate: 0.05}}\n")
    options = ["--methods", "s_lora", "ncm", "--benchmarks", "digits", "--seeds", "0", "--num_workers", "2"]
    monkeypatch.setattr(sys, "argv", [script := str(REPO / "recipes" / "compare.py"), "--config", str(path), *options])
    runpy.run_path(script, run_name="__main__")
    printed = capfd.readouterr().out
    ncm, s_lora = rows_of("out/digits/results.csv")
    assert (ncm["method"], s_lora["method"]) == ("ncm", "s_lora")
    assert float(s_lora["average_accuracy"]) > 0.85 and float(ncm["average_accuracy"]) == pytest.approx(
        0.955, abs=0.01
    )
    assert int(s_lora["images_seen"]) == 1437 and int(ncm["images_seen"]) == 0
    assert s_lora["weight_hash"].startswith("e7afa38e4187") and "torch" in json.loads(s_lora["versions"])
    assert len(json.loads(s_lora["accuracy_matrix"])) == 5 and s_lora["backbone"] == "hf-clpeft/vit-tiny-glyphs"
    table = Path("out/digits/results.md").read_text()
    assert table.index("| experts per task | s_lora |") < table.index("| closed form | ncm |") and table in printed
    for what in ("curves", "accuracy", "routing"):
        assert Path(f"out/digits/results_{what}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_table_is_finished_where_it_was_left(config, tmp_path, capsys):
    args, results = CompareArguments(str(config)), tmp_path / "results.csv"
    runs = plan(args, read_config(args.config))
    run_all([run for run in runs if run.seed == 0], results, num_workers=1)
    before = results.read_text().splitlines()
    rows = run_all(runs, results, num_workers=1)
    assert "6 runs, of which 3 stand in" in capsys.readouterr().out
    assert set(before) < set(results.read_text().splitlines())
    assert [(row["method"], int(row["seed"])) for row in rows] == [(run.method, run.seed) for run in runs]
    table = make_table(rows)
    assert " ± " in table and "## digits" in table
    assert "| oracle-routed | calibration error | forwards" in table  # a column where rows have it
    plain = make_table([{**row, "calibration_error": ""} for row in rows])
    assert "| oracle-routed | forwards" in plain and "calibration" not in plain
    seen = {
        name: {int(row["images_seen"]) for row in rows if row["method"] == name}
        for name in read_yaml(config)["methods"]
    }
    assert seen == {"s_lora": {256}, "s_lora, gaussian": {256}, "linear_probe": {0}}


def test_rows_that_were_measured_with_other_options_are_not_passed_off(config, tmp_path):

    args = CompareArguments(str(config))
    runs = plan(args, read_config(args.config))
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
        ("benchmarks: {digits: {}}\nmethods: {ncm: {}}\nfamilies: [ncm]", "families=.* must have lists"),
        (
            "benchmarks: {digits: {}}\nmethods: {ncm: {}}\nreferences: ncm",
            "references='ncm' must have lists of methods",
        ),
    ],
)
def test_a_file_that_cannot_work_is_refused_before_anything_is_learnt(text, message, tmp_path):

    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        args = CompareArguments(str(tmp_path / "wrong.yaml"))
        run_all(plan(args, read_config(args.config)), tmp_path / "results.csv", 1)


@pytest.mark.parametrize("path", sorted((REPO / "recipes" / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_of_the_repo_can_be_planned(path):
    config = read_yaml(path)
    if not {"methods", "series"} & config.keys() or "benchmarks" not in config:
        return  # others stand on top of it
    read = read_sweep if "series" in config else read_config
    runs = plan(CompareArguments(str(path)), read(str(path)))
    for giver in {run.needs for run in runs} - {run.method for run in runs} - {None}:
        # In the output folder of the main table, as the file says.
        assert giver in read_config(str(path.parents[1] / "main_cpu.yaml"))["methods"]
        for folder in {run.options["experts_from"] for run in runs if run.needs == giver}:
            Path(folder).mkdir(parents=True)
            Path(folder, "config.json").touch()
    assert chains_of(runs, {})


def test_every_method_stands_in_the_main_table():
    names = read_yaml(REPO / "recipes" / "configs" / "methods.yaml")["methods"]
    general = {name for name, kind in METHODS.items() if "peft" in {f.name for f in fields(kind.Config)}}
    package = {name for name, kind in METHODS.items() if kind.__module__.startswith("hf_clpeft.")}
    assert package - general - {"closed_form"} <= {*names}


def test_every_method_of_the_main_table_stands_in_one_family():
    config = read_config(str(REPO / "recipes" / "configs" / "main_cpu.yaml"))
    assert sorted(name for names in config["families"].values() for name in names) == sorted(config["methods"])
    assert {*config["references"]} <= {*config["methods"]}


@pytest.mark.parametrize("failing, expected", [(None, "adebc"), ("a", "abc"), ("d", "adebc")])
def test_who_takes_experts_over_follows_at_once_if_there_are_any(failing, expected):
    needs = {"a": None, "b": None, "c": None, "d": "a", "e": "a"}
    runs = [Run("digits", name, 0, {"experts_from": "a"}, name, giver) for name, giver in needs.items()]
    started, noted = [], []

    def start(run):
        assert started == noted  # one by one
        started.append(run.method)
        done = Future()
        done.set_result(None)
        return done

    def note(run, ended):
        noted.append(run.method)
        return run.method != failing

    in_order(chains_of(runs, {}), start, note, num_workers=1)
    assert "".join(started) == expected


TUNED = """
benchmarks:
  digits: {}
  split_tiny_imagenet: {methods: {s_lora: {learning_rate: 0.5}, sequential_lora: {learning_rate: 0.25}}}
methods:
  s_lora: {head_learning_rate: 0.125}
  s_lora_pp: {tuned_as: s_lora}
  sequential_lora: {tuned_as: s_lora}
  "S-LoRA, twice": {method: s_lora, k: 2}
"""


def test_rates_are_those_of_another_method_until_a_method_has_its_own(tmp_path):
    (tmp_path / "tuned.yaml").write_text(TUNED)
    args = CompareArguments(str(tmp_path / "tuned.yaml"))
    runs = {(run.benchmark, run.method): run.options for run in plan(args, read_config(args.config))}
    rates = {key: (options.get("learning_rate"), options.get("head_learning_rate")) for key, options in runs.items()}
    assert rates == {
        ("digits", "s_lora"): (0.01, 0.125),
        ("digits", "s_lora_pp"): (0.005, 0.125),  # its own on the digits
        ("digits", "sequential_lora"): (0.01, 0.125),
        ("digits", "S-LoRA, twice"): (0.01, 0.002),
        ("split_tiny_imagenet", "s_lora"): (0.5, 0.125),
        ("split_tiny_imagenet", "s_lora_pp"): (0.5, 0.125),
        ("split_tiny_imagenet", "sequential_lora"): (0.25, 0.125),
        ("split_tiny_imagenet", "S-LoRA, twice"): (0.5, None),
    }
    args.config = str(tmp_path / "wrong.yaml")
    Path(args.config).write_text(TUNED.replace("tuned_as: s_lora", "tuned_as: s_loar"))
    with pytest.raises(ConfigError, match="no method 's_loar'; did you mean s_lora"):
        plan(args, read_config(args.config))


def test_a_copy_of_a_data_set_has_the_name_of_the_benchmark_or_of_its_repo(tmp_path):
    assert copy_of("split_tiny_imagenet", str(tmp_path)) == tmp_path / "split_tiny_imagenet"
    for name in ("tiny-imagenet", "split_tiny_imagenet"):
        (tmp_path / name).mkdir()
        assert copy_of("split_tiny_imagenet", str(tmp_path)) == tmp_path / name


def row(benchmark, method, seed, accuracy, **more):
    known = {"benchmark": benchmark, "method": method, "seed": str(seed), "average_accuracy": str(accuracy)}
    known |= {"backbone": "vit", "weight_hash": "0f3c" * 16, "image_size": "32", "device": "cpu"}
    known |= {"versions": '{"torch": "2.13"}', "accuracy_matrix": "[[1.0, null], [0.5, 0.5]]", "train_images": "64"}
    return known | more


def test_a_table_says_what_is_missing_and_how_to_measure_it():
    cost = {"stored_bytes": "4000", "forwards_per_image": "2.0", "train_seconds": "12"}
    rows = [row("digits", "s_lora", seed, 0.5 + 0.1 * seed, **cost) for seed in (0, 1)]
    wanted = [(b, m, seed) for seed in (0, 1) for b in ("digits", "pacs") for m in ("ncm", "s_lora")]
    lines = make_table(rows, wanted, "python compare.py").splitlines()
    assert "vit (weights 0f3c0f3c0f3c) at 32 px, cpu; torch 2.13; seeds 0, 1." in lines
    assert "| s_lora | 55.0 ± 7.1 | – |" in lines and "| ncm | – | – |" in lines
    assert "Not measured yet: 6 runs. With your own paths in place of capitals:" in lines
    assert [line for line in lines if line.startswith("python")] == [
        "python compare.py --methods ncm --benchmarks digits --seeds 0 1",
        "python compare.py --methods ncm s_lora --benchmarks pacs --seeds 0 1",
    ]
    head = next(line for line in lines if "forwards an image" in line).split(" | ")
    cells = next(line for line in lines if line.startswith("| s_lora") and len(line.split(" | ")) == len(head))
    shown = dict(zip(head, cells.split(" | "), strict=True))
    assert [shown[name] for name in ("forwards an image", "stored kB a task", "training seconds")] == [
        "2.0",
        "2",
        "12",
    ]
    assert "Not measured" not in make_table(rows, [(b, m, s) for b, m, s in wanted if (b, m) == ("digits", "s_lora")])


def test_families_stand_together_in_the_table_and_have_panels_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    config = {"families": {"closed form": ["slda", "ncm"], "experts": ["s_lora", "tuna"]}}
    routed, ridge = {"routing_accuracy": "0.75"}, {"trained_parameters": "0"}
    rows = [row("digits", "s_lora", seed, 0.5 + 0.25 * seed, **routed, **ridge) for seed in (0, 1)]
    rows += [row("digits", name, 0, 0.5, **ridge) for name in ("mine", "ncm", "slda")]
    families = families_of(config, [row["method"] for row in rows])
    assert families == {"closed form": ["slda", "ncm"], "experts": ["s_lora"], "others": ["mine"]}
    assert families_of({}, ["ncm"]) == {}
    lines = [line for line in make_table(rows, families=families).splitlines() if line.startswith("|")]
    assert lines[0] == "| family | method | digits |"
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| closed form", "slda"],
        ["| ", "ncm"],
        ["| experts", "s_lora"],
        ["| others", "mine"],
    ]
    paths = draw_table(rows, tmp_path / "results", families, ["ncm"])
    assert [path.stem for path in paths] == ["results_curves", "results_accuracy", "results_routing"]
    curves, dots, routing = drawn
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in curves.axes]
    assert legends == [["slda"], ["s_lora"], ["mine"]]
    assert [text.get_text() for text in curves.legends[0].get_texts()] == ["ncm"]
    assert all(len(axis.lines) == 2 for axis in curves.axes)  # ncm beside each of them
    labels = [label.get_text() for label in dots.axes[0].get_yticklabels()]
    assert labels == ["closed form", "slda", "ncm", "experts", "s_lora", "others", "mine"]
    assert [label.get_text() for label in routing.axes[0].get_yticklabels()] == ["experts", "s_lora"]
    paths = draw_table(rows, tmp_path / "results")  # without families, all in one panel, and each matrix
    assert [path.stem[8:] for path in paths] == ["curves", "parameters", "routing", "matrix_digits"]


@pytest.mark.usefixtures("deep")
def test_forwards_are_counted_layer_by_layer(fresh_backbone):
    stream = load_benchmark("digits", max_test_samples_per_task=4)
    for name, expected in (("s-lora", 2), ("s-prompts", 2), ("l2l", 2), ("s-lora-mix", 4)):
        model = ContinualModel.from_pretrained(f"hf-clpeft/{name}-digits", backbone=fresh_backbone)
        assert forwards_per_image(model, stream) == expected
    model.method.query_layers = [2, 3]  # of six: half a pass, and three with an expert each
    assert forwards_per_image(model, stream) == 3.5


def test_forwards_of_experts_that_run_on_a_copy_are_counted_too(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(4, per_class=4), num_tasks=2)
    for layers, expected in ((None, 2), ([2], 1.5)):  # of two
        peft = {"peft_type": "IA3", "target_modules": ["v_proj", "fc2"], "feedforward_modules": ["fc2"]}
        trainer = make_trainer(s_x(peft=peft, expert_layers=layers), tmp_path / str(layers), num_train_epochs=1)
        trainer.learn_stream(stream)
        assert forwards_per_image(trainer.model, stream) == expected


SWEEP = """
seeds: [0]
x: query_layers
measures: [average_accuracy, routing_accuracy]
options: {num_train_epochs: 1}
benchmarks:
  digits: {num_tasks: 2, max_train_samples_per_task: 32, max_test_samples_per_task: 12}
series:
  SLDA: {method: slda, vary: {query_layers: [3, 6]}}
  S-LoRA: {method: s_lora, k: 2, experts_from: S-LoRA, vary: {query_layers: [3, 6]}}
  Gaussian: {method: s_lora, router: gaussian, experts_from: S-LoRA, vary: {query_layers: [3, 6]}}
"""


@pytest.mark.usefixtures("deep")
def test_a_sweep_trains_its_experts_once_and_draws_a_line_for_each_series(tmp_path):
    (tmp_path / "layers.yaml").write_text(SWEEP)
    args = CompareArguments(str(tmp_path / "layers.yaml"))
    runs = plan(args, read_sweep(args.config))
    assert [run.needs for run in runs] == [None, None, None, *["S-LoRA, query_layers 3"] * 3]
    rows = run_all(runs, tmp_path / "results.csv", num_workers=1)
    config = read_yaml(tmp_path / "layers.yaml")
    series = points_of(config)
    assert line_of(rows, series["SLDA"], "query_layers", "routing_accuracy") is None
    places, values = line_of(rows, series["Gaussian"], "query_layers", "routing_accuracy")
    assert places == [3, 6] and values.shape == (1, 2)
    assert [path.is_file() for path in draw(rows, config, tmp_path / "results")] == [True, True]


@pytest.mark.parametrize("line", ["xs: k", "x:"])
def test_a_sweep_that_cannot_work_is_refused(line, tmp_path):
    (tmp_path / "wrong.yaml").write_text(SWEEP.replace("x: query_layers", line))
    with pytest.raises(ConfigError, match="lacks"):
        read_sweep(str(tmp_path / "wrong.yaml"))


def test_places_that_have_names_keep_them_on_the_axis(monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    plot_series({"digits": {"s_lora": (["1", "20", "auto"], np.array([[0.5, 0.7, 0.6]]))}}, "k.png", "k", "routing")
    (figure,) = drawn
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "20", "auto"]


def test_own_pictures_and_a_benchmark_are_compared_from_the_command_line(hub, fails):
    words = ("--methods", "ncm", "slda", "--num_workers", "1")
    text = run_command("compare", pictures("birds", [0, 1, 2, 3]), *words)
    assert "32 training images of 4 classes in 2 tasks" in text
    assert "vit-tiny-glyphs, bundled, as" in text and "20 passes, 8 images at a time" in text
    assert "| method | birds |" in text and "| ncm | 100.0 |" in text
    assert {path.name for path in Path("out/birds").glob("*.*")} >= {"results.csv", "results.md", "results_curves.png"}
    assert "hf-clpeft compare birds --methods ncm slda --num_workers 1 --seeds 1" in text
    text = run_command("compare", "birds", "--seeds", "0", "1", *words)
    assert "4 runs, of which 2 stand in" in text
    assert "hf-clpeft compare birds --methods ncm slda --num_workers 1 --seeds 2" in text
    small = '{"num_tasks": 2, "max_train_samples_per_task": 32, "max_test_samples_per_task": 12}'
    assert "| slda |" in run_command("compare", "digits", *words, "--options", small)
    for words, message, status in [
        ((), "Give a data set, or a file by --config", 2),
        (("nowhere",), "neither a folder of images nor a data set on the Hub", 1),
        (("birds", "--methods", "knn"), "There is no method 'knn'", 2),
        (("birds", "--mehtods", "ncm"), "did you mean --methods", 2),
        (("birds", "--methods", "ncm", "--options", '{"epochs": 3}'), "ncm on birds: there is no option 'epochs'", 2),
    ]:
        said, code = fails("compare", *words)
        assert message in said and code == status, said
