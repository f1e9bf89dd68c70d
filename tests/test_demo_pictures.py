"""Pictures that a model carries: taken in training, saved and shared with care, shown in the demo."""

import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, SEVEN
from PIL import Image, ImageDraw

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    combine,
    load_benchmark,
    s_lora,
)
from hf_clpeft.demo import views
from hf_clpeft.demo.gallery import Gallery, tiles
from hf_clpeft.demo.models import Models
from hf_clpeft.demo.saliency import overlay, saliency, words
from hf_clpeft.storage.folder import hash_file


def train(folder, tasks=2, **options):
    stream = load_benchmark("digits", max_train_samples_per_task=40, max_test_samples_per_task=10)
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(r=1, k=3))
    args = ContinualTrainingArguments(str(folder), num_train_epochs=1, disable_tqdm=True, **options)
    trainer = ContinualTrainer(model, args)
    for task in stream[:tasks]:
        trainer.learn(task)
    return model


@pytest.fixture(scope="module")
def carrying(tmp_path_factory):
    """A folder of a model with pictures."""
    folder = tmp_path_factory.mktemp("carrying") / "model"
    train(folder, tasks=3, num_thumbnails=4, num_examples=4)
    return folder


def listed(folder):
    return {path for path in json.loads(Path(folder, "config.json").read_text())["files"] if path.endswith(".jpg")}


def test_pictures_are_kept_as_many_as_asked_for_and_saved(carrying):
    model = ContinualModel.from_pretrained(carrying)
    names = [task.name for task in model.config.tasks]
    assert {f"thumbnails/{name}.jpg" for name in names} <= model.pictures.keys() == listed(carrying)
    examples = sorted(path for path in model.pictures if path.startswith("examples/"))
    assert len(examples) == 4 and {path[9:17] for path in examples} == set(names)
    assert [len(tiles(model, name)) for name in names] == [4, 4, 4]
    assert sorted(path.name for path in Path(carrying, "examples").iterdir()) == [Path(path).name for path in examples]


def test_private_data_stays_private(tmp_path):
    model = train(tmp_path / "private", tasks=1, hub_private_repo=True)
    assert not model.pictures and not listed(tmp_path / "private")
    assert not any(path.startswith("thumbnails/") for path in train(tmp_path / "open", tasks=1).pictures)
    with pytest.raises(ConfigError, match="num_thumbnails"):
        ContinualTrainingArguments("out", num_thumbnails=33)


def test_an_unlearnt_task_takes_its_pictures_along(carrying, tmp_path):
    shutil.copytree(carrying, tmp_path / "model")
    model = ContinualModel.from_pretrained(tmp_path / "model")
    model.remove("task-001")
    model.save_pretrained(tmp_path / "model")
    assert not [path for path in (tmp_path / "model").rglob("*.jpg") if "task-001" in path.name]
    assert ContinualModel.from_pretrained(tmp_path / "model").pictures == model.pictures != {}


def test_combined_models_keep_their_pictures(carrying, tmp_path):
    train(tmp_path / "other", tasks=1, num_thumbnails=2, num_examples=0)
    combined = combine([carrying, tmp_path / "other"])
    combined.save_pretrained(tmp_path / "both")
    both = ContinualModel.from_pretrained(tmp_path / "both")
    counts = {task.name: len(tiles(both, task.name)) for task in both.config.tasks}
    assert sorted(counts.values()) == [2, 4, 4, 4] and both.pictures.keys() == listed(tmp_path / "both")


def test_pictures_go_to_the_hub_and_back(carrying, hub):
    model = ContinualModel.from_pretrained(carrying)
    model.push_to_hub("alice/digits", token="hf_alice")
    assert ContinualModel.from_pretrained("alice/digits").pictures == model.pictures
    model.remove("task-002")
    model.push_to_hub("alice/digits", token="hf_alice")
    assert ContinualModel.from_pretrained("alice/digits").pictures == model.pictures


def disguise(folder, path, content):
    """Puts a file in the place of a picture, as a stranger would who wants it to be loaded."""
    Path(folder, path).parent.mkdir(exist_ok=True)
    Path(folder, path).write_bytes(content)
    config = json.loads(Path(folder, "config.json").read_text())
    config["files"][path] = hash_file(Path(folder, path))
    Path(folder, "config.json").write_text(json.dumps(config))


def bomb():
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, "JPEG")
    head, frame, rest = file.getvalue().partition(b"\xff\xc0\x00\x0b\x08")
    return head + frame + struct.pack(">HH", 20_000, 20_000) + rest[4:] + bytes(2**18)


@pytest.mark.parametrize("content", [b"no picture", b"", bomb(), Path(SEVEN).read_bytes()])
def test_what_is_no_thumbnail_is_not_shown(carrying, tmp_path, content):
    shutil.copytree(carrying, tmp_path / "model")
    disguise(tmp_path / "model", "thumbnails/task-000.jpg", content)
    disguise(tmp_path / "model", "examples/task-000-0.jpg", content)
    models = Models(str(tmp_path / "model"))
    assert tiles(models.served, "task-000") == []
    assert Gallery().nearest(models.served, "task-000", Image.open(SEVEN).convert("RGB")) is None
    assert len(models.examples()) == 3 + (content == Path(SEVEN).read_bytes())


@pytest.mark.parametrize(
    "path, content, message",
    [
        ("thumbnails/task-000.jpg", bytes(2**19 + 1), "at most 524,288"),
        ("thumbnails/task-009.jpg", b"", "which no task needs"),
        ("examples/task-000-x.jpg", b"", "which no task needs"),
    ],
)
def test_what_no_model_would_carry_is_refused(carrying, tmp_path, path, content, message):
    shutil.copytree(carrying, tmp_path / "model")
    disguise(tmp_path / "model", path, content)
    with pytest.raises(ConfigError, match=message):
        ContinualModel.from_pretrained(tmp_path / "model")


def test_the_route_shows_the_training_picture_nearest_to_it(carrying):
    model = ContinualModel.from_pretrained(carrying)
    for name in ("task-000", "task-002"):
        for small in tiles(model, name):
            found = Gallery().nearest(model, name, small)
            assert np.array_equal(found, small)
    (prediction,) = model.predict(EXAMPLES[0], top_k=5)
    strip = views.verdict(prediction, model, 0.05, Image.open(EXAMPLES[0]), tiles(model, "task-000")[0])
    assert strip.count("<img") == 2 and "most like this training picture" in strip


def corner(row, column):
    """A digit's stroke in one corner of a grey picture."""
    image = Image.new("RGB", (64, 64), (40, 40, 40))
    ImageDraw.Draw(image).line([(column + 8, row + 2), (column + 8, row + 20)], fill="white", width=5)
    return image


@pytest.mark.parametrize("name", ["s-lora", "s-lora-mix", "l2l", "s-prompts-pp"])
def test_a_heat_map_lies_where_something_is(name):
    model = ContinualModel.from_pretrained(f"hf-clpeft/{name}-digits")
    for (row, column), where in (((2, 2), "top left"), ((40, 40), "bottom right")):
        heat = saliency(model, corner(row, column))
        assert heat.shape == (16, 16) and abs(heat.sum() - 1) < 1e-6 and where in words(heat)
    assert 'alt="Heat map. The ' in overlay(corner(2, 2), heat)


def test_a_heat_map_is_there_for_a_class_weighed_against_nothing(tmp_path):
    model = train(tmp_path / "one", tasks=1)
    from datasets import Dataset, DatasetDict

    from hf_clpeft.streams import load_task

    rows = {"image": [corner(2, 2), corner(3, 3), corner(2, 4)], "label": ["bar"] * 3}
    task = load_task(DatasetDict(train=Dataset.from_dict(rows)), "bars", test_size=0)
    ContinualTrainer(model, ContinualTrainingArguments(str(tmp_path / "one"), disable_tqdm=True)).learn(task)
    assert model.predict(corner(2, 2))[0].label == "bar"
    assert saliency(model, corner(2, 2)).std() > 1e-4


def test_the_page_shows_where_it_looks(ask):
    picture, grid = ask("/explain", SEVEN, "")
    assert "<img" in picture and len(grid) == 16 and abs(sum(map(sum, grid)) - 1) < 0.01
