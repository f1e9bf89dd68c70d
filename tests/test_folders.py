"""Folders of pictures: what is a split, what a class, and what is said of the rest."""

import logging
import os
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from hf_clpeft import StreamError, TaskStream, load_task
from hf_clpeft.streams.folders import find_pictures, list_files


def draw(root, *files):
    for number, file in enumerate(files):
        path = Path(root, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg"):
            Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(path, "png")
        else:
            path.write_text("{}")
    return str(root)


def in_folders(*folders, count=2):
    return [f"{folder}/{number}.png" for folder in folders for number in range(count)]


def paths_of(split):
    return {encoded["path"] for encoded, _, _ in split}


LIKE_SPLITS = (
    "train test val dev eval validation training testing Test TRAIN test-tube dev-kit eval_board train_station "
    "val2 test.1".split()
)


@pytest.mark.parametrize("name", [*LIKE_SPLITS, "bus stop train", "[x]", "what?", "st*r", "__bg__", "naïve"])
def test_a_class_may_be_called_anything(name, tmp_path):
    folder = draw(tmp_path / "train" / "test [1]", *in_folders(name, "other"))
    (task,) = TaskStream.class_incremental(folder, num_tasks=1, test_size=0)
    assert set(task.classes) == {name, "other"} and len(list(task.train)) == 4
    files = in_folders(*(f"{split}/{one}" for split in ("TRAIN", "Test") for one in (name, "other")))
    assert set(find_pictures("there", files).splits) == {"TRAIN", "Test"}
    assert find_pictures("there", files).classes == sorted([name, "other"])


def test_test_pictures_are_not_learnt_whatever_classes_are_called(tmp_path):
    folder = draw(tmp_path, *in_folders(*(f"{split}/{name}" for split in ("train", "test") for name in LIKE_SPLITS)))
    (task,) = TaskStream.class_incremental(folder, num_tasks=1)
    assert task.classes == tuple(sorted(LIKE_SPLITS))
    for side, split in (("train", task.train), ("test", task.test)):
        assert paths_of(split) == {str(path) for path in tmp_path.glob(f"{side}/*/*.png")}


@pytest.mark.parametrize(
    "files, splits, classes",
    [
        (in_folders("train/a", "val/a", "test/a"), ["test", "train", "val"], ["a"]),
        (in_folders("training/a", "dev/a"), ["dev", "training"], ["a"]),
        (in_folders("train/a", "train/b", "test"), ["train"], ["a", "b"]),
        (in_folders("train/a/1", "train/b", "train/b/2"), ["train"], ["a", "b"]),
        (in_folders("data/train/a", "data/test/a"), ["test", "train"], ["a"]),
        (in_folders("train/train", "train/test"), ["train"], ["test", "train"]),
        (in_folders("a/2023", "a/2024", "b"), ["train"], ["a", "b"]),
        (in_folders("bus/2024", "train"), ["train"], ["bus", "train"]),
        (in_folders("a", "b") + ["a/._0.png", "__MACOSX/a/0.png", ".ipynb_checkpoints/0.png"], ["train"], ["a", "b"]),
        (in_folders("a", "b") + ["a/.old/0.png", "a/notes.txt", "classes.txt", "b/0.json"], ["train"], ["a", "b"]),
        (["a/1.PNG", "b/2.Jpg", "b/3.webp", "c/4.avif"], ["train"], ["a", "b", "c"]),
    ],
)
def test_splits_and_classes_are_found_by_one_rule(files, splits, classes):
    found = find_pictures("there", files)
    assert (list(found.splits), found.classes) == (splits, classes)


@pytest.mark.parametrize(
    "files, message",
    [
        (in_folders("train", "test"), "'test', 'train', named like splits, without class folders: .*there/test/CLASS"),
        (in_folders("train"), "there/train/CLASS; or, if these are the classes, .* there/train/train"),
        (in_folders("train/a", "test/a", "extra/a"), "'test' could be a split or a class, as 'extra' is next to it"),
        (in_folders("car/2023", "train/2023"), "name the splits with train_split and test_split; .*there/train/train"),
        (in_folders("a", ".net"), r"'.net' has 2 images but is hidden. If it is a class, rename it"),
        (in_folders("pets/cat", "pets/dog"), "has images only in the folder 'pets'.* pass there/pets; if"),
        (["1.png", "2.png", "backup/1.png"], "there has images but no class folders: .* there/robin/1.jpg"),
        (in_folders("a", "b\udcff"), r"the name of 'b\\udcff/0.png' is not valid UTF-8"),
        (["a/1.txt"], "there has no images"),
    ],
)
def test_what_may_be_two_things_is_refused_with_a_way_out(files, message):
    with pytest.raises(StreamError, match=message) as told:
        find_pictures("there", files)
    assert "\n" not in str(told.value)


def test_named_splits_are_splits(tmp_path):
    folder = draw(tmp_path, *in_folders("train/a", "train/b", "extra/a", "extra/b", "test/a", "test/b"))
    stream = TaskStream.class_incremental(folder, num_tasks=1, train_split="extra", test_split="test")
    assert len(list(stream[0].train)) == len(list(stream[0].test)) == 4
    assert all("/extra/" in path for path in paths_of(stream[0].train))


def test_splits_go_by_the_names_that_datasets_gives_them_too(tmp_path):
    folder = draw(tmp_path, *in_folders("training/a", "training/b", "val/a", "val/b"))
    for options in ({}, {"test_split": "validation"}, {"test_split": "val", "train_split": "training"}):
        stream = TaskStream.class_incremental(folder, num_tasks=1, **options)
        assert all("/val/" in path for path in paths_of(stream[0].test))
    half = TaskStream.class_incremental(folder, num_tasks=1, test_split="val[:50%]")
    assert len(list(half[0].test)) == 2
    with pytest.raises(StreamError, match="has no split 'test'; its splits are"):
        TaskStream.class_incremental(folder, test_split="test")


def test_what_is_left_out_is_told(tmp_path, caplog):
    files = ["cover.jpg", "train/banner.png", "c/.keep", "labels/1.txt"]
    draw(tmp_path / "one", *in_folders("a", "b"), "cover.jpg", "labels/1.txt")
    (tmp_path / "one" / "empty").mkdir()
    assert load_task(tmp_path / "one", "one").classes == ("a", "b")
    assert "skipping images outside of class folders: 'cover.jpg'" in caplog.text
    assert "skipping the folders 'empty', 'labels', which have no images" in caplog.text
    find_pictures("there", [*in_folders("train/a", "test"), *files[1:2]])
    assert "'banner.png'" in caplog.text and "folders 'test', which have no class folders" in caplog.text


def test_links_are_followed_but_not_in_circles(tmp_path):
    draw(tmp_path / "elsewhere", *in_folders("a", "b"))
    folder = tmp_path / "links"
    folder.mkdir()
    for name in "ab":
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    (folder / "a" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    assert [file for file in list_files(folder) if file.endswith(".png")] == in_folders("a", "b")
    assert load_task(folder, "links", test_size=0).classes == ("a", "b")


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    draw(tmp_path, *in_folders("a", "b"))
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StreamError, match=r"b' cannot be read: Permission denied"):
        load_task(tmp_path, "locked")


def test_a_picture_that_changes_is_another_one(tmp_path):
    draw(tmp_path, *in_folders("a", "b"))
    first = load_task(tmp_path, "pets", test_size=0).train.dataset
    again = load_task(tmp_path, "pets", test_size=0).train.dataset
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "0.png")
    changed = load_task(tmp_path, "pets", test_size=0).train.dataset
    assert first._fingerprint == again._fingerprint != changed._fingerprint


def test_folders_can_be_streamed(tmp_path):
    draw(tmp_path, *in_folders(*(f"{split}/{name}" for split in ("train", "test") for name in ("train", "bus"))))
    stream = TaskStream.class_incremental(str(tmp_path), num_tasks=2, streaming=True)
    assert stream.classes == ["bus", "train"]
    assert [paths_of(task.train) for task in stream] == [
        {str(path) for path in tmp_path.glob(f"train/{name}/*.png")} for name in ("bus", "train")
    ]


def test_metadata_beside_pictures_says_what_they_are_but_not_their_folders(tmp_path):
    rows = "".join(f"{name}/{number}.png,{name}\n" for name in ("train", "bus") for number in range(2))
    draw(tmp_path / "one [1]", *in_folders("train", "bus"))
    (tmp_path / "one [1]" / "metadata.csv").write_text("file_name,label\n" + rows)
    task = load_task(tmp_path / "one [1]", "one", test_size=0)
    assert task.classes == ("bus", "train") and len(list(task.train)) == 4
    for split in ("train", "val"):
        draw(tmp_path / "two" / split, *in_folders("test", "bus"))
        (tmp_path / "two" / split / "metadata.csv").write_text("file_name,label\n" + rows.replace("train", "test"))
    task = load_task(tmp_path / "two", "two")
    assert task.classes == ("bus", "test")
    assert all("/val/" in path for path in paths_of(task.test)) and len(list(task.train)) == 4


def test_parquet_files_and_saved_data_sets_are_read_from_any_path(tmp_path):
    rows = Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * 4, "label": ["a", "b"] * 2})
    folder = tmp_path / "train [2024]*"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    draw(folder, "docs/cover.png")
    assert len(list(load_task(folder, "parquet").test)) == 4
    rows.save_to_disk(tmp_path / "saved")
    assert len(list(load_task(tmp_path / "saved", "saved", test_size=0).train)) == 4


def test_places_without_a_data_set_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pets.zip").write_bytes(b"")
    with pytest.raises(StreamError, match="empty' is empty"):
        load_task(tmp_path / "empty", "none")
    with pytest.raises(StreamError, match=r"pets.zip' is a file. Pass the folder"):
        load_task(tmp_path / "pets.zip", "none")
    for place in ("./pets", "/data/pets", "lab/pets/train"):
        with pytest.raises(StreamError, match=f"There is no folder '{place}'"):
            load_task(place, "none")
    with pytest.raises(StreamError, match="A list is not a data set"):
        load_task([1, 2], "none")


def many_pictures(hub, repo, files, **others):
    contents = {}
    for number, file in enumerate(files):
        draw("made", f"{number}.png")
        contents[file] = Path("made", f"{number}.png").read_bytes() + bytes([number])
    hub.commit(repo, {**contents, **others}, repo_type="dataset")


@pytest.mark.parametrize("streaming", [False, True])
def test_repos_of_pictures_are_read_by_the_same_rule(streaming, hub):
    side_files = {f"train/bus/{number}.txt": b"0 0.5" for number in range(9)}
    many_pictures(hub, "lab/vehicles", in_folders("train/bus", "train/train", "test/bus", "test/train"), **side_files)
    (task,) = TaskStream.class_incremental("lab/vehicles", num_tasks=1, streaming=streaming)
    assert task.classes == ("bus", "train")
    assert len(list(task.train)) == len(list(task.test)) == 4
    many_pictures(hub, "lab/flat", in_folders("train", "test"))
    with pytest.raises(StreamError, match="lab/flat@.* named like splits, without class folders"):
        TaskStream.class_incremental("lab/flat", num_tasks=1, streaming=streaming)


def test_downloaded_pictures_are_used_when_the_hub_cannot_be_reached(hub, monkeypatch, caplog):
    many_pictures(hub, "lab/toys", in_folders("car", "train"))
    assert load_task("lab/toys", "toys", test_size=0).classes == ("car", "train")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    caplog.set_level(logging.WARNING)
    assert load_task("lab/toys", "toys", test_size=0).classes == ("car", "train")
    assert "Using the images in the local cache" in caplog.text
