"""The demo's lessons: what visitors teach is theirs alone, and is what they are told."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import EXAMPLES
from gradio_client.exceptions import AppError
from PIL import Image
from test_pictures import archive_of

from hf_clpeft import ContinualModel
from hf_clpeft.demo import views
from hf_clpeft.demo.pictures import VisitorError
from hf_clpeft.demo.teaching import Lesson, leave_one_out, sort_pictures, teach


def test_a_taught_class_is_recognised_and_every_old_answer_stays(ask, letters, digits):
    outcome, key, archive = ask("/teach", "letter A", list(letters[:5]), "")
    assert "Learnt <b><bdi>letter A</bdi></b> (5 pictures)" in outcome and "<b>4 of your 5 pictures</b>" in outcome
    assert "No old weight has changed; 0 of 10 answers to the examples have." in outcome
    for letter in letters[5:8]:
        assert ask("/predict", letter, key)[3]["label"] == "letter A"
        assert ask("/predict", letter, "")[3]["label"] != "letter A"  # nobody else's model has changed
    shutil.unpack_archive(archive, "taught")
    taught = ContinualModel.from_pretrained("taught")
    assert taught.predict(EXAMPLES) == digits.predict(EXAMPLES)
    assert taught.config.classes[-1] == "letter A"
    with pytest.raises(AppError, match="knows 'letter A' already"):
        ask("/teach", "letter A", list(letters[:5]), key)
    _, key, _ = ask("/teach", "letter X", [letters[8]] * 3, key)
    assert "Task 7" in ask("/look_inside", 7, None, key)[0]


def test_folders_in_an_archive_are_classes_that_are_trained(ask, letters):
    members = {f"set/{'A' if 'A-' in p.name else 'X'}/{i}.png": p.read_bytes() for i, p in enumerate(letters)}
    archive_of(members | {f"set/X/{i}.png": letters[8].read_bytes() for i in range(20, 22)}, "letters.zip")
    outcome, key, _ = ask("/teach", "", [Path("letters.zip")], "")
    assert "<b><bdi>A</bdi></b> (8 pictures), <b><bdi>X</bdi></b> (3 pictures)" in outcome
    assert ask("/predict", letters[8], key)[3]["label"] == "X"


def test_a_taught_model_is_pushed_with_the_visitors_own_token_only(ask, letters, hub, monkeypatch):
    _, key, _ = ask("/teach", "letter A", list(letters[:3]), "")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")  # of whoever runs the server
    for token, key_, message in (("", key, "your own token"), ("hf_alice", "", "Teach a class first")):
        with pytest.raises(AppError, match=message):
            ask("/push", "alice/letters", token, key_)
    with pytest.raises(AppError) as refused:
        ask("/push", "alice/letters", "hf_wrong", key)
    assert "hf_wrong" not in str(refused.value)
    assert "alice/letters" in ask("/push", "alice/letters", "hf_alice", key)
    assert ContinualModel.from_pretrained("alice/letters").config.classes[-1] == "letter A"


def pictures(count, folder=""):
    return [(f"{folder}{i}.png", Image.new("RGB", (8, 8))) for i in range(count)]


@pytest.mark.parametrize(
    "name, uploads, message",
    [
        ("cat", [], "no picture yet"),
        ("cat", pictures(2), "'cat' has 2 pictures; give 3 or more"),
        ("", pictures(3), "a name of 1 to 40 letters"),
        ("<script>", pictures(3), "a name of 1 to 40 letters"),
        ("7", pictures(3), "knows '7' already"),
        ("cat", pictures(201), "at most 200"),
        ("", [item for i in range(21) for item in pictures(3, f"class {i}/")], "63 pictures of 21 classes"),
        ("cat", [*pictures(2), ("x.svg", VisitorError("x.svg is an SVG drawing"))], "2 pictures.*SVG drawing"),
    ],
)
def test_what_cannot_be_taught_says_why(name, uploads, message):
    with pytest.raises(VisitorError, match=message):
        sort_pictures(name, uploads, known=["7"])


def test_a_lesson_that_fails_says_so_and_what_helps(ask):
    noise = np.random.default_rng(0)
    for number in range(4):  # digits are what is nearest to each of them
        digit = np.asarray(Image.open(EXAMPLES[2 * number]).convert("RGB"), dtype=float)
        blurred = np.clip(digit + noise.normal(0, 4, digit.shape), 0, 255).astype(np.uint8)
        Image.fromarray(blurred).save(f"{number}.png")
    outcome, _, _ = ask("/teach", "not a thing", [Path(f"{number}.png") for number in range(4)], "")
    assert "Taught <b>" in outcome and "<b>0 of your 4 pictures</b>" in outcome and "More pictures help" in outcome
    advice = re.findall(r"[\d.]+ %", outcome)
    measured = (Path(__file__).parents[1] / "docs" / "demo.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (SLDA\+\+|S-LoRA, prototypes).*?\| ([\d.]+) \|", measured, re.MULTILINE)
    assert advice == [f"{recognised} %" for _, recognised in rows] and "<code>slda_pp</code>" in outcome


def test_leaving_one_out_is_what_a_new_picture_meets(handlers, letters):
    images = [Image.open(path).convert("RGB") for path in letters[:8]]
    tried, recognised = leave_one_out(handlers.models.served, {"A": images}, 0.05)
    found = 0
    for number, image in enumerate(images):
        others = [*images[:number], *images[number + 1 :]]
        lesson = teach(handlers.models, "", {"A": others})
        (answer,) = handlers.models.batcher.predict(handlers.models.get(lesson.key), [image], reject_rate=0.05)
        found += answer.label == "A"
    assert (tried, recognised) == (8, found)


def test_a_downloaded_model_can_be_given_back(ask, letters):
    _, key, archive = ask("/teach", "letter A", list(letters[:5]), "")
    outcome, again = ask("/give_back", Path(archive))
    assert again not in ("", key) and "It knows 11 classes, lastly <bdi>letter A</bdi>" in outcome
    assert ask("/predict", letters[6], again)[3] == ask("/predict", letters[6], key)[3]


def test_what_was_not_downloaded_here_is_not_taken(ask, letters, saved):
    other = shutil.make_archive("other", "zip", saved)
    archive_of({"../../evil.json": b"{}"}, "outside.zip")
    archive_of({"config.json": b"{"}, "broken.zip")
    Path("no.zip").write_bytes(b"nothing")
    for name, message in (
        (other, "does not begin with the same tasks"),
        ("outside.zip", "was not made by this page"),
        ("broken.zip", "config.json"),
        ("no.zip", "is no archive of a model"),
    ):
        with pytest.raises(AppError, match=message):
            ask("/give_back", Path(name))


def test_a_model_is_recalled_with_its_download_while_it_is_there(handlers, letters):
    assert handlers.recall(None)[:2] == ("", "")
    said, key, archive = handlers.recall("gone")
    assert "not here any more" in said and key == "" and not archive.visible
    _, key, _ = handlers.teach("letter A", [str(path) for path in letters[:3]])
    said, again, archive = handlers.recall(key)
    assert "lastly <bdi>letter A</bdi>" in said and again == key and archive.visible
    shutil.unpack_archive(handlers.models.folder(key).with_suffix(".zip"), "taught")
    assert ContinualModel.from_pretrained("taught").config.classes[-1] == "letter A"
    assert "which you taught" in views.introduction(handlers.models.get(key), "here", taught=True)


def test_a_lesson_after_a_model_is_gone_begins_with_the_original(ask, letters):
    with pytest.raises(AppError, match="not here any more"):
        ask("/predict", letters[0], "gone")
    outcome, key, _ = ask("/teach", "letter A", list(letters[:5]), "gone")
    assert "began with the original model" in outcome and "Learnt" in outcome
    assert ask("/predict", letters[6], key)[3]["label"] == "letter A"
    assert "original model" not in ask("/teach", "letter X", [letters[8]] * 3, key)[0]


def test_what_is_no_picture_is_left_out_and_said(ask, letters):
    archive_of({**{f"A/{p.name}": p.read_bytes() for p in letters[:3]}, "A/big.png": bytes(21 * 2**20)}, "letters.zip")
    outcome, _, _ = ask("/teach", "", [Path("letters.zip")], "")
    assert "(3 pictures)" in outcome and "A/big.png has more than 20 MB, so it was left out" in outcome


def test_pictures_to_teach_from_fit_into_memory():
    big = Image.new("1", (20_000, 20_000))
    with pytest.raises(VisitorError, match="more than 800 megapixels together"):
        sort_pictures("cat", [(f"{number}.png", big) for number in range(3)], known=[])


def test_copies_of_one_picture_teach_that_picture_and_the_lesson_says_so(handlers, letters):
    image, models = Image.open(letters[8]).convert("RGB"), handlers.models
    for count in (3, 5):
        lesson = teach(models, "", {"X": [image] * count})
        (found,) = models.batcher.predict(models.get(lesson.key), [image], reject_rate=0.05)
        assert (found.label, lesson.tried, lesson.recognised) == ("X", count, count)
        said = views.lesson(lesson, {"X": [image] * count}, models.served)
        assert said.startswith("<p>Taught") and "all are the same" in said and "give different ones" in said


def test_a_lesson_lets_others_in_between_and_ends_in_time(handlers, letters, monkeypatch):
    images, model = [Image.open(path).convert("RGB") for path in letters[:5]], handlers.models.served
    ran = []

    def run(function):
        ran.append(function)
        return function()

    assert leave_one_out(model, {"A": images}, 0.05, run) == (5, 4) and len(ran) == 2 * 5 + 1
    assert leave_one_out(model, {"A": images}, 0.05, end=time.monotonic()) == (0, 0)
    clock = iter([*[0] * 5, 0, 0, 0, 2])  # time for reading all, and for trying three
    monkeypatch.setattr("hf_clpeft.demo.teaching.time", SimpleNamespace(monotonic=lambda: next(clock)))
    tried, recognised = leave_one_out(model, {"A": images}, 0.05, end=1)
    assert tried == 3
    lesson = Lesson("", Path(), "", 200, tried, recognised, 0, 0)
    assert f"<b>{recognised} of 3 of your pictures</b>" in views.lesson(lesson, {"A": images}, model)
    assert "no time left" in views.lesson(replace(lesson, tried=0, recognised=0), {"A": images}, model)
