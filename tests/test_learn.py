"""A model of one's own from the command line: made, grown and used, on the Hub and in a folder."""

import importlib
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKBONE, pictures, run
from hub_server import Fault
from typer.testing import CliRunner

from hf_clpeft import ContinualModel, ContinualTrainer, cli
from hf_clpeft.config import ConfigError
from hf_clpeft.config.places import find_place
from hf_clpeft.streams import readable
from hf_clpeft.training.callbacks import CallbackList


learning = importlib.import_module("hf_clpeft.cli.learn")  # which the command hides
REPO = "me/birds"
TINY = ("--backbone", BACKBONE, "--views", "2")


def test_a_repo_is_made_and_learns_more_without_the_old_pictures(me):
    text = run("learn", pictures("spring", [0, 1]), "--to", REPO, *TINY)
    assert "me/birds, a repo on the Hub: it reads OWNER/NAME" in text and "--adapt" in text
    assert "spring: 2 classes (bird 0, bird 1), 16 pictures to learn from, 4 to measure with" in text
    assert "up to 8 pictures go along" in text and "--num_examples 0" in text
    assert "accuracy    100.0 %" in text and "hf-clpeft predict me/birds PICTURE" in text
    Path("spring").rename("gone")
    text = run("learn", pictures("october", [2]), "--to", REPO)
    assert "slda_pp, as before" in text and "it knows    3 classes of 2 tasks" in text
    repo = me.repo(REPO)
    assert [commit.title for commit in repo.commits()[:2]] == ["Learn october: bird 2", "Learn spring: bird 0, bird 1"]
    assert list(repo.tags) == ["spring", "october"] and not [*Path().glob("birds*")]
    model = ContinualModel.from_pretrained(REPO)
    assert model.config.method.to_dict()["adapt"] is False and model.config.method.views == 2
    rows = json.loads(run("predict", REPO, "gone", "october", "--json"))
    assert all(row["label"] == Path(row["image"]).parent.name for row in rows)


def test_a_folder_holds_a_model_of_any_method_with_its_own_options(hub):
    words = ("--to", "./out/birds", "--method", "s_lora", "--backbone", BACKBONE)
    text = run("learn", pictures("a", [0, 1]), *words, "--r", "2", "--k", "3", "--learning_rate", "0.02")
    assert "out/birds, a folder: it begins with '.'" in text and not hub.requests("POST", "")
    assert "20 passes over the pictures, 8 at a time" in text and "--learning_rate 0.02 --head_learning_rate" in text
    text = run("learn", pictures("b/a", [2, 3]), "--to", "out/birds", "--k", "3")
    assert "a-2: 2 classes" in text and "--learning_rate 0.02" in text  # as the first time
    model = ContinualModel.from_pretrained("out/birds")
    assert (model.config.method.r, model.config.method.k, model.bank.names) == (2, 3, ["a", "a-2"])
    assert [model.report.stream, model.report.measured()] == ["a", [1]]


def test_learning_rates_are_chosen_on_held_out_pictures_of_the_first_task(hub):
    words = ("--method", "s_prompts", "--backbone", BACKBONE, "--k", "1", "--num_train_epochs", "1")
    text = run("learn", pictures("a", [0, 1]), "--to", "out", *words, "--tune")
    trials = re.findall(r"tuning +([\d.]+) % with rates (\S+) and (\S+)", text)
    assert len(trials) == 6
    best = max(float(accuracy) for accuracy, *_ in trials)
    chosen = re.search(r"--learning_rate (\S+) --head_learning_rate (\S+)", text).groups()
    assert (f"{best}", *chosen) in trials


def test_help_shows_the_options_of_the_method_that_is_chosen(hub):
    text = run("learn", "--help")
    assert "--adapt" in text and "--to " in text and "--output_dir" not in text
    assert "--prompt_length" in run("learn", "--method", "s_prompts", "--help")


@pytest.mark.parametrize(
    "name, is_repo",
    [("me/birds", True), ("./me/birds", False), ("../birds", False), ("/tmp/birds", False), ("~/birds", False)]
    + [("birds", False), ("my/own/birds", False), ("me/there", False), ("me/birds/", False)],
)
def test_what_is_a_folder_and_what_a_repo(name, is_repo):
    Path("me/there").mkdir(parents=True)
    place = find_place(name)
    assert place.is_repo == is_repo and place.why
    with pytest.raises(ConfigError, match="'me/b rds' is no valid repo id .* For a folder, write ./me/b rds"):
        find_place("me/b rds")


def test_mistakes_end_before_any_work(me, fails, monkeypatch):
    pictures("good", [0, 1]), pictures("one", [2]), pictures("again", [1, 2])
    for place in ("flat", "empty/robin", "empty/wren"):
        Path(place).mkdir(parents=True)
    for number, picture in enumerate(sorted(Path("good").rglob("*.png"))[:3]):
        Path("flat", f"{number}.png").write_bytes(picture.read_bytes())
    run("learn", "good", "--to", "birds", *TINY)
    monkeypatch.setattr(ContinualTrainer, "learn_stream", lambda *_: pytest.fail("it learns"))
    for words, message, status in [
        (
            ("nowhere", "--to", "new"),
            "'nowhere' is neither a folder of images nor a data set on the Hub. There is no such folder",
            1,
        ),
        (("good/*", "--to", "new"), "There is no folder 'good/\\*', and it is not a valid Hub id", 1),
        (("flat", "--to", "new"), "flat has images but no class folders: .* flat/robin/1.jpg", 1),
        (("empty", "--to", "new"), "'empty' is empty: put the pictures of each class into a folder", 1),
        (("one", "--to", "new"), "a single class, 'bird 2', and a model tells at least two apart", 1),
        (("again", "--to", "birds"), "birds knows bird 1 already, from good: leave those pictures out", 1),
        (("one", "--to", "birds", "--name", "good"), "--name good: birds has learnt a task of this name", 1),
        (("one", "--to", "birds", "--method", "ncm"), "--method ncm: the model there is one of slda_pp; leave it", 2),
        (("one", "--to", "birds", "--views", "9"), "birds was made with views=2, not 9", 1),
        (("one", "--to", "birds", "--image_size", "48"), "birds was made with image_size=32, not 48", 1),
        (("one", "--to", "birds", "--tune"), "--tune is for the first task", 1),
        (("good", "--to", "tuned", *TINY, "--tune"), "--tune: slda_pp with these options makes no training steps", 2),
        (("good",), "the following arguments are required: --to", 2),
        (("good", "--to", "new", "--veiws", "9"), "no option --veiws; did you mean --views", 2),
        (("good", "--to", "new", "--output_dir", "x"), "There is no option --output_dir", 2),
        (("good", "--to", "new", "--method", "slda++"), "--method: 'slda\\+\\+' does not exist; did you mean slda", 2),
        (
            ("good", "--to", "new", "--method", "sldapp"),
            "'sldapp' does not exist; did you mean slda_pp\\? See --help.$",
            2,
        ),
        (("good", "more", "--to", "new"), "'more' does not belong to an option", 2),
        (("good", "--to", "good"), "good holds bird 0, and no model: name a folder that is new or empty", 1),
    ]:
        said, code = fails("learn", *words)
        assert re.search(message, said) and code == status, (words, said)
    assert not me.requests("POST", "") and not Path("new").exists()
    monkeypatch.delenv("HF_TOKEN")
    said, _ = fails("learn", "good", "--to", REPO)
    assert "Cannot push to me/birds" in said and "hf auth login" in said
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    said, _ = fails("learn", "good", "--to", "alice/birds")
    assert "Cannot push to alice/birds" in said


def test_a_hub_that_fails_costs_nothing(me, fails):
    me.faults.append(Fault("POST", "/commit/", status=503, times=10**6))
    said, status = fails("learn", pictures("spring", [0, 1]), "--to", REPO, *TINY)
    folder = re.search(r"It waits in (\S+);", said)[1]
    assert status == 1 and f"hf-clpeft push {folder} {REPO}" in said
    me.faults.clear()
    said, _ = fails("learn", pictures("october", [2]), "--to", REPO)
    assert "holds spring, which was learnt for me/birds and could not be pushed" in said
    run("push", folder, REPO)
    run("learn", "october", "--to", REPO)
    assert list(me.repo(REPO).tags) == ["spring", "october"] and not Path(folder).exists()


def test_memory_that_does_not_suffice_halves_the_batch(hub, monkeypatch):
    learn_stream, sizes = ContinualTrainer.learn_stream, []

    def short_of_memory(trainer, stream):
        sizes.append((trainer.args.train_batch_size, trainer.args.eval_batch_size))
        if trainer.args.eval_batch_size > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return learn_stream(trainer, stream)

    monkeypatch.setattr(ContinualTrainer, "learn_stream", short_of_memory)
    words = ("--method", "s_lora", "--num_train_epochs", "1", "--train_batch_size", "64", "--backbone", BACKBONE)
    assert "again with 32 pictures at a time" in run("learn", pictures("a", [0, 1]), "--to", "out", *words)
    assert sizes == [(64, 128), (64, 64), (32, 32)]


def test_the_bundled_backbone_serves_where_the_usual_one_cannot_be_had(hub):
    text = run("learn", pictures("a", [0, 1]), "--to", "out", "--views", "2")
    assert f"{BACKBONE}, bundled, as google/vit-base-patch16-224-in21k is not on this Hub" in text
    assert "WARNING: it is made for drawn letters and signs; for photographs: --backbone google/vit-base" in text


def test_an_interrupted_run_goes_on_with_the_same_command(me, monkeypatch):
    """Killed by Ctrl-C in the middle of training, it ends as if nothing had been."""
    words = ("learn", pictures("a", [0, 1]), "--method", "s_lora", "--backbone", BACKBONE, "--num_train_epochs", "3")
    run(*words, "--to", "whole")
    undisturbed = CallbackList.__call__
    monkeypatch.setattr(CallbackList, "__call__", interrupting_at(4))
    result = CliRunner().invoke(cli.app, [*map(str, words), "--to", REPO])
    assert result.exit_code == 130 and "The same command goes on from here" in result.output
    monkeypatch.setattr(CallbackList, "__call__", undisturbed)
    text = run(*words, "--to", REPO)
    assert "An earlier run was interrupted here" in text
    assert ContinualModel.from_pretrained(REPO).config.files == ContinualModel.from_pretrained("whole").config.files


def interrupting_at(wanted):
    def call(callbacks, event, *arguments):
        if event == "on_step_end" and arguments[1] == wanted:
            os.kill(os.getpid(), signal.SIGINT)

    return call


@pytest.fixture
def read(monkeypatch):
    """What `learn` has to learn from and to measure with, and what it warns of; nothing is learnt."""
    sizes = []

    def stop(model, args, stream, there):
        sizes.extend([len(stream[0].train.dataset), 0 if stream[0].test is None else len(stream[0].test.dataset)])
        raise ConfigError("enough")

    monkeypatch.setattr(learning, "_train", stop)

    def of(fails, caplog, *words):
        caplog.clear(), sizes.clear()
        said, _ = fails("learn", *words, "--to", "new", *TINY)
        return said, sizes, " ".join(record.getMessage() for record in caplog.records)

    return of


@pytest.mark.parametrize("classes", ["abc", "a", "ab"])
def test_the_only_picture_of_a_class_is_learnt(classes, hub, read, fails, caplog):
    for name in "abc":
        pictures("all", [0], per_class=1 if name in classes else 10)
        Path("all", "bird 0").rename(Path("all", name))
    _, sizes, warned = read(fails, caplog, "all")
    others = 3 - len(classes)
    assert sizes == [len(classes) + 8 * others, 2 * others]
    assert f"{', '.join(classes)}: a single image each, which is learnt" in warned


def test_a_model_learns_of_one_picture_per_class(hub):
    text = run("learn", pictures("few", [0, 1, 2], per_class=1), "--to", "out", *TINY)
    assert "3 pictures to learn from\n" in text and "not measured, as no picture was held out" in text


def test_pictures_that_cannot_be_read_are_named_and_left_out(hub, read, fails, caplog):
    folder = Path(pictures("mixed", [0, 1], per_class=20))
    paths = sorted(folder.rglob("*.png"))
    for path, content in zip(paths[:3], (b"\x89PNG", b"", paths[2].read_bytes()[:60]), strict=True):
        path.write_bytes(content)
    _, sizes, warned = read(fails, caplog, folder)
    assert sum(sizes) == 37 and "3 of 40 images cannot be read" in warned and "They are left out" in warned
    assert all(path.name in warned for path in paths[:3])
    for path in paths[3:5]:
        path.write_bytes(b"")
    said, sizes, _ = read(fails, caplog, folder)
    assert "5 of 40 images cannot be read" in said and "--max_bad_images 5" in said and "dataset." not in said
    assert said.count("bird 0") == 5 and "Only 4 may be left out, 10% of them" in said and not sizes
    assert sum(read(fails, caplog, folder, "--max_bad_images", "5")[1]) == 35
    assert "Only 0 may be left out:" in read(fails, caplog, folder, "--max_bad_images", "0")[0]
    for path in paths[:20]:
        path.write_bytes(b"")
    assert "No image of bird 0 is left" in read(fails, caplog, folder, "--max_bad_images", "20")[0]


@pytest.mark.parametrize(
    "names, words",
    [
        (["x/a", "x/b", "y/c"], "images in the folders 'a', 'b' below 'x' are taken as x; so are those below 1 more"),
        (["x", "y/c"], "images in the folder 'c' below 'y' are taken as y. If it is a class, give nested/y."),
        (["train/x/a", "train/y"], "images in the folder 'a' below 'x' are taken as x."),
    ],
)
def test_folders_below_classes_are_told_of(names, words, hub, read, fails, caplog):
    for name in names:
        pictures(Path("nested", name), [0], per_class=5)
        for path in Path("nested", name, "bird 0").iterdir():
            path.rename(path.parents[1] / path.name)
        Path("nested", name, "bird 0").rmdir()
    assert words in read(fails, caplog, "nested")[2]
    assert "below" not in read(fails, caplog, pictures("flat", [0, 1]))[2]


def test_pictures_are_tried_without_holding_all_of_them_in_memory(monkeypatch):
    taken, tried = [], []

    def rows():
        for number in range(300):
            taken.append(number)
            yield {"image": number}

    def problem(column, row):
        assert len(taken) - len(tried) <= readable.AT_ONCE
        tried.append(row[column])
        return "bad" * (row[column] in (7, 299))

    monkeypatch.setattr(readable, "_problem", problem)
    source = SimpleNamespace(dataset=SimpleNamespace(select_columns=lambda names: rows()), image_column="image")
    assert readable._unreadable(source) == {7: "bad", 299: "bad"} and len(tried) == 300
