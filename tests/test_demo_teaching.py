"""The demo's lessons: what visitors teach is theirs alone, and is what they are told."""

import re
import shutil
import time
import unicodedata
import zipfile
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
        ("Ka\u0308fer", pictures(3), "knows 'Käfer' already"),
        ("cat", pictures(1), "'cat' has 1 picture; give 3 or more"),
        ("letter A", pictures(2, "a/"), "'letter A' has 2 pictures; give 3 or more"),
        ("", [*pictures(1, "a/"), *pictures(2, "b/")], "'a' has 1 picture; give 3 or more"),
        ("", [*pictures(3, "a/"), *pictures(3)], "a name of 1 to 40 letters"),
        ("cat", pictures(201), "at most 200"),
        ("", [item for i in range(21) for item in pictures(3, f"class {i}/")], "63 pictures of 21 classes"),
        ("cat", [*pictures(2), ("x.svg", VisitorError("x.svg is an SVG drawing"))], "2 pictures.*SVG drawing"),
    ],
)
def test_what_cannot_be_taught_says_why(name, uploads, message):
    with pytest.raises(VisitorError, match=message):
        sort_pictures(name, uploads, known=["7", "Ka\u0308fer"])


@pytest.mark.parametrize(
    "name",
    [
        "हाथी",
        "แมว",
        "Käfer",
        "it’s",
        "C#",
        "50%",
        "cat: big",
        "Rock & Roll",
        "AT&T",
        "cat_1",
        "مرحبا",
        "猫",
        "🐱",
        "a" * 40,
    ]
    + ["👩\u200d🚀", "می\u200cخواهم", "क्\u200dष", "“A”", "letter-A", "+1", ".5", "❤\ufe0f", "A"],
)
def test_a_class_may_be_called_as_people_write(name):
    assert list(sort_pictures(name, pictures(3), known=["cat"])[0]) == [name]
    assert list(sort_pictures("", pictures(3, f"set/{name}/"), known=["cat"])[0]) == [name]
    assert list(sort_pictures(unicodedata.normalize("NFD", f" {name}\n"), pictures(3), known=[])[0]) == [name]


@pytest.mark.parametrize(
    "name, character",
    [
        ("<b>", "'<' .LESS-THAN SIGN"),
        ("cat\\dog", "REVERSE SOLIDUS"),
        ("\u202egnp", "U.202E|RIGHT-TO-LEFT OVERRIDE"),
        ("a\x00b", "U.0000"),
        ("a\x1b[2J", "U.001B"),
        ("cat\u200b", "ZERO WIDTH SPACE"),
        ("ca\u200dt", "ZERO WIDTH JOINER"),
        ("猫\u200d", "ZERO WIDTH JOINER"),
        ("\u3164", "HANGUL FILLER"),
        ("\ue000", "U.E000"),
        ("\ud800", "U.D800"),
        ("a" * 41, "it has 41 characters"),
        ("...", "nothing that can be read"),
        ("\u0301a", "begins with an accent"),
    ],
)
def test_a_refused_name_is_told_with_its_character_and_folder(name, character):
    for typed, folder in ((name, ""), ("", f"set/{name}/")):
        with pytest.raises(VisitorError, match=f"{character}.*1 to 40 letters") as refused:
            sort_pictures(typed, pictures(3, folder), known=[])
        assert str(refused.value).startswith("The folder '") == bool(folder)
    with pytest.raises(VisitorError, match="'/' .SOLIDUS"):
        sort_pictures("cat/dog", pictures(3), known=[])


@pytest.mark.parametrize(
    "name, uploads, classes, left_out",
    [
        ("letter A", pictures(3, "my photos/"), {"letter A": 3}, []),
        ("", pictures(3, "my photos/"), {"my photos": 3}, []),
        ("letter A", pictures(3, "7/"), {"letter A": 3}, []),
        ("zz", [*pictures(3, "a/"), *pictures(1)], {"zz": 3}, ["0.png, outside of the folders"]),
        ("", [*pictures(2), *pictures(3, "a/")], {"a": 3}, ["0.png, outside", "1.png, outside of the folders"]),
        ("", [*pictures(3, "a/"), *pictures(1, "b/")], {"a": 3}, ["b/0.png, in the folder 'b': a class needs 3"]),
        ("x", [*pictures(3, "a/"), *pictures(4, "b/"), *pictures(2)], {"a": 3, "b": 4}, ["0.png", "1.png"]),
        ("x", [*pictures(3, "a/"), *pictures(3)], {"a": 3, "x": 3}, []),
        ("a", [*pictures(2, "a/"), *pictures(1)], {"a": 3}, []),
        ("", pictures(1, "<b>/") + pictures(3, "a/"), {"a": 3}, ["<b>/0.png"]),
    ],
)
def test_a_typed_name_is_meant_and_strays_are_left_out(name, uploads, classes, left_out):
    found, told = sort_pictures(name, uploads, known=["7"])
    assert {label: len(of_class) for label, of_class in found.items()} == classes
    assert len(told) == len(left_out) and all(map(str.startswith, told, left_out))


def test_names_of_many_scripts_are_learnt_saved_and_given_back(handlers, letters):
    names = ["हाथी", "it’s", "C#", "🐱", "Käfer: 50%"]
    decomposed = [unicodedata.normalize("NFD", name) for name in names]  # as a Mac writes them
    archive_of({f"{name}/{p.name}": p.read_bytes() for name in decomposed for p in letters[:3]}, "names.zip")
    outcome, _, archive = handlers.teach("", ["names.zip"])
    assert all(f"<bdi>{name}</bdi>" in outcome for name in names)
    assert handlers.models.get(handlers.give_back(archive)[1]).config.classes[-5:] == sorted(names)


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
    with zipfile.ZipFile(archive) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    assert "config.json" in files and not [name for name in files if f"/{name}".count("/.")]
    # Unpacked, and packed again with its folder, as macOS does it.
    junk = {".DS_Store": b"x", "__MACOSX/model/._config.json": b"x", "__MACOSX/._model": b"x"}
    archive_of({**{f"model/{name}": data for name, data in files.items()}, **junk}, "model 2.zip")
    _, third = ask("/give_back", Path("model 2.zip"))
    assert ask("/predict", letters[6], third)[3] == ask("/predict", letters[6], key)[3]


def test_what_was_not_downloaded_here_is_not_taken(ask, letters, saved):
    other = shutil.make_archive("other", "zip", saved)
    archive_of({"../../evil.json": b"{}"}, "outside.zip")
    archive_of({"config.json": b"{"}, "broken.zip")
    archive_of({f"photos/{path.name}": path.read_bytes() for path in letters}, "photos.zip")
    archive_of({path.name: path.read_bytes() for path in letters}, "loose.zip")
    archive_of({}, "empty.zip")
    archive_of({"config.json/a.json": b"{}"}, "folder.zip")
    archive_of({"experts/task-000/config.json": b"{}"}, "deep.zip")
    archive_of({"a/config.json": b"{}", "b/config.json": b"{}"}, "two.zip")
    archive_of({".git/config.json": b"{}", "__MACOSX/config.json": b"{}"}, "hidden.zip")
    Path("no.zip").write_bytes(b"nothing")
    for name, message in (
        (other, "does not begin with the same tasks"),
        ("outside.zip", "was not made by this page"),
        ("broken.zip", "^config.json is not valid|^config.json cannot be used: config.json is not valid"),
        ("photos.zip", "photos.zip holds no config.json, so it is no model"),
        ("loose.zip", "holds no config.json"),
        ("empty.zip", "holds no config.json"),
        ("folder.zip", "holds no config.json"),
        ("deep.zip", "holds no config.json"),
        ("hidden.zip", "holds no config.json"),
        ("two.zip", "holds more than one config.json"),
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


def test_an_edited_model_is_refused_without_a_word_of_the_servers_folders(ask, letters):
    _, key, archive = ask("/teach", "letter A", list(letters[:5]), "")
    with zipfile.ZipFile(archive) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    expert = "experts/task-005/adapter_model.safetensors"
    for name, data in (
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", files["config.json"].replace(b"letter A", b"")),
        ("router.safetensors", b"nothing"),
        (expert, None),
        (expert, files[expert] + b"x"),
        ("experts/task-009/adapter_model.safetensors", b"x"),
        ("heads.safetensors", None),
        ("metrics.json", b"{"),
        ("preprocessor_config.json", b"{"),
    ):
        edited = {path: content for path, content in {**files, name: data}.items() if content is not None}
        archive_of(edited, "edited.zip")
        with pytest.raises(AppError) as refused:
            ask("/give_back", Path("edited.zip"))
        said = str(refused.value)
        assert name in said and "hf-clpeft-" not in said and "/model" not in said, said


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
