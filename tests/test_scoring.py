"""A model is measured on labelled pictures, and a task removed, from the command line."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import pictures, run
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from typer.testing import CliRunner

from hf_clpeft import ContinualModel, cli
from hf_clpeft.backbones.bundled import DIGITS_MODEL
from hf_clpeft.config import ConfigError
from hf_clpeft.scoring import evaluate, labelled_images
from hf_clpeft.streams import load_benchmark


REPO = "me/birds"
pytestmark = pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)


def test_numbers_are_those_of_the_training_report(learnt):
    images = [(encoded, task.classes[number]) for task in learnt.stream for encoded, number, _ in task.test]
    found, report = evaluate(learnt.model, images, batch_size=7), learnt.report
    summary = report.summary()
    of_tasks = [found.tasks[name].accuracy for name in report.tasks]
    assert of_tasks == pytest.approx(report.accuracy_matrix[-1])
    assert found.total.routing_accuracy == pytest.approx(summary["routing_accuracy"], abs=1e-6)
    assert found.calibration_error == pytest.approx(summary["calibration_error"], abs=1e-5)
    assert found.total.images == len(images) == sum(score.images for score in found.classes.values())
    refused = [p.label is None for p in learnt.model.predict([image for image, _ in images], reject_rate=0.1)]
    assert evaluate(learnt.model, images, reject_rate=0.1).total.rejected == pytest.approx(np.mean(refused))


def test_what_the_model_does_not_know_is_apart(learnt):
    digits = load_benchmark("digits", max_test_samples_per_task=12)
    images = [(encoded, task.classes[number]) for task in digits for encoded, number, _ in task.test]
    found = evaluate(learnt.model, images)
    assert set(found.unknown) == {"6", "7", "8", "9"} and math.isnan(found.unknown["7"].accuracy)
    assert found.total.images == 36 and found.unknown["7"].rejected > 0.5 > found.total.rejected
    assert found.to_dict()["unknown"]["7"]["accuracy"] is None
    with pytest.raises(ConfigError, match="knows none of the classes .*\\([67], [67]\\); it knows 0, 1"):
        evaluate(learnt.model, images[36:48])


def test_a_method_that_neither_routes_nor_rejects_has_no_such_numbers(learnt, hub):
    run("learn", pictures("a", [0, 1]), "--to", "out", "--method", "linear_probe")
    found = json.loads(run("evaluate", "out", "a", "--json"))
    assert found["reject_rate"] is None and found["total"]["routing_accuracy"] is None
    assert "routing" not in run("evaluate", "out", "a").split("task")[0]


def test_test_splits_come_first_and_all_pictures_count_without_one(learnt):
    rows = {"image": [next(labelled_images("digits"))[0]] * 3, "label": [0, 1, -1]}
    columns = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict(rows, features=columns)
    splits = DatasetDict(train=data.select([0, 1]), validation=data.select([1]), test=data.select([2]))
    assert [label for _, label in labelled_images(splits)] == ["b"]  # those of `test` are withheld
    assert [label for _, label in labelled_images(splits, split="train")] == ["a", "b"]
    assert [label for _, label in labelled_images(DatasetDict(train=data.select([0])))] == ["a"]


def test_evaluate_goes_on_after_what_it_cannot_read(learnt, hub, fails):
    run("learn", pictures("a", [0, 1]), "--to", "out", "--views", "2")
    Path("a/bird 0/broken.png").write_bytes(b"\x89PNG")
    said, status = fails("evaluate", "out", "a")
    assert status == 1 and "a/bird 0/broken.png" in said
    Path("a/bird 0/broken.png").unlink()
    text = run("evaluate", "out", "a")
    assert "accuracy           100.0 %" in text and "bird 1" in text and "at --reject-rate 0.05" in text
    said, status = fails("evaluate", "out", "nowhere")
    assert status == 1 and "neither a folder of images nor a data set" in said


def test_a_task_is_removed_from_a_repo_by_one_commit(learnt, me, fails, monkeypatch):
    for name, classes in (("spring", [0, 1]), ("october", [2])):
        run("learn", pictures(name, classes), "--to", REPO, *(["--views", "2"] if name == "spring" else []))
    commits = len(me.repo(REPO).commits())
    said, status = fails("remove", REPO, "october")
    assert status == 2 and "no terminal to ask whether october may be removed from me/birds; add --yes" in said
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    said, _ = fails("remove", REPO, "winter")
    assert "There is no task 'winter' to remove; the model has learnt spring, october" in said
    assert len(me.repo(REPO).commits()) == commits
    done = json.loads(run("remove", REPO, "october", "--yes", "--json"))
    assert done["forgotten"] == ["bird 2"] and done["tasks"] == ["spring"]
    assert [commit.title for commit in me.repo(REPO).commits()][0] == "Remove october"
    assert len(me.repo(REPO).commits()) == commits + 1
    assert ContinualModel.from_pretrained(REPO).config.removed == ["october"]
    run("learn", "october", "--to", REPO)  # under another name, as this one was unlearnt
    assert ContinualModel.from_pretrained(REPO).config.tasks[-1].name == "october-2"


def test_a_task_is_removed_from_a_folder_or_nothing_changes(saved, learnt, fails, monkeypatch):
    before = (saved / "config.json").read_bytes()
    for words, message in [
        ((DIGITS_MODEL, "task-000"), "is bundled with the package"),
        (("me/birds@task-000", "task-000"), "names a revision"),
        ((saved, "task-000", "--squash-history"), "a folder has no history"),
    ]:
        assert message in fails("remove", *words, "--yes")[0]
    asked = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sys.modules["hf_clpeft.cli.remove"], "sys", asked)
    result = CliRunner().invoke(cli.app, ["remove", str(saved), "task-001"], input="n\n")
    assert result.exit_code == 1 and "It forgets 2, 3. [y/N]" in result.output
    assert (saved / "config.json").read_bytes() == before
    result = CliRunner().invoke(cli.app, ["remove", str(saved), "task-001"], input="y\n")
    assert result.exit_code == 0, result.output
    assert ContinualModel.from_pretrained(saved).config.classes == ["0", "1", "4", "5"]


def test_what_cannot_be_unlearnt_says_so(learnt, hub, fails):
    run("learn", pictures("a", [0, 1]), "--to", "out", "--method", "slda_pp", "--adapt", "--views", "2")
    run("learn", pictures("b", [2, 3]), "--to", "out")
    said, status = fails("remove", "out", "a", "--yes")
    assert status == 1 and "'a' cannot be removed exactly, as its expert takes everyone's query features" in said
