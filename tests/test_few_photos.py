"""The measurement of lessons from a few photos: a model and two data sets in, rows of a CSV out."""

import csv
import sys

import few_photos
import pytest
from conftest import make_trainer, pattern_dataset, pictures

from hf_clpeft import ConfigError, TaskStream, slda_pp


@pytest.fixture
def words(tmp_path):
    """Of a model that knows two of four classes."""
    data = tmp_path / "patterns"
    data.mkdir()
    for split, rows in pattern_dataset(per_class=12).items():
        rows.to_parquet(data / f"{split}.parquet")
    stream = TaskStream.class_incremental(str(data), num_tasks=2)
    make_trainer(slda_pp(adapt=False, views=2), tmp_path / "model").learn(stream[0])
    images = ["--new_images", str(data), "--old_images", str(data), "--old_photos", "6"]
    return ["--model", str(tmp_path / "model"), *images, "--num_classes", "2", "--results", str(tmp_path / "few.csv")]


def measure(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["few_photos.py", *words])
    few_photos.main()


def test_classes_are_taught_alone_and_in_a_row(tmp_path, monkeypatch, words):
    for _ in range(2):
        measure(monkeypatch, [*words, "--new_photos", "6"])
    with (tmp_path / "few.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["lessons"], row["new_photos"]) for row in rows[:3]] == [
        ("alone", "1", "12"),
        ("in a row", "1", "6"),
        ("in a row", "2", "12"),
    ]
    assert rows[:3] == rows[3:] and rows[0]["router"] == "gaussian" and rows[0]["training_images"] == "24"
    assert all(float(row["recognised"]) > 0.8 and float(row["changed"]) < 0.2 for row in rows)


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "num_classes=2 is more than the 0 classes .* and 7 test images"),
        (["--new_photos", "6", "--old_images", "birds"], "birds has no test image of a class that the model knows"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_lesson(monkeypatch, words, more, said):
    monkeypatch.setattr(few_photos, "teach", None)
    pictures("birds", classes=[0, 1])
    with pytest.raises(ConfigError, match=said):
        measure(monkeypatch, [*words, *more])
