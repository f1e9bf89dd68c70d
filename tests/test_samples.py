"""Data sets as people hand them over, and samples in which every class has an image."""

import base64
import io
import logging
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_trainer, pattern_dataset
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value
from PIL import Image as PILImage

from hf_clpeft import (
    ContinualModel,
    StreamError,
    TaskStream,
    load_benchmark,
    load_task,
    s_lora_mix,
    slda,
)
from hf_clpeft.streams import BENCHMARKS, open_images
from hf_clpeft.streams.sampling import first_of_each, sample_rows
from hf_clpeft.streams.task import hold_out


def pictures(count):
    return [PILImage.new("RGB", (4, 4), (number, 0, 0)) for number in range(count)]


def rows(labels, column="label", **others):
    return Dataset.from_dict({"image": pictures(len(labels)), column: labels, **others})


def named(labels, names="abcd"):
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": pictures(len(labels)), "label": labels}, features)


def positions(split):
    return [label for _, label, _ in split]


LABELS = [number % 4 for number in range(20)]


@pytest.mark.parametrize(
    "data, classes",
    [
        (rows(LABELS), ["0", "1", "2", "3"]),
        ({"train": rows(LABELS)}, ["0", "1", "2", "3"]),
        (rows([float(label) for label in LABELS]), ["0", "1", "2", "3"]),
        (rows([label > 1 for label in LABELS]), ["False", "True"]),
        (rows(["abcd"[label] for label in LABELS]), ["a", "b", "c", "d"]),
        (DatasetDict(training=rows(LABELS), train=rows(LABELS)), ["0", "1", "2", "3"]),
    ],
)
def test_labels_of_any_type_that_names_classes_are_learnt(data, classes):
    stream = TaskStream.class_incremental(data, num_tasks=2)
    assert stream.classes == classes
    assert all(len(set(positions(task.train))) == len(task.classes) for task in stream)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[label] for label in LABELS], "label_column 'label' holds a list in every row.*`dataset.map`"),
        ([[0] * (label + 1) for label in LABELS], "label_column 'label' holds a list in every row"),
        ([{"name": "a", "id": label} for label in LABELS], r"a struct of .*flatten.* label_column to 'label.name'"),
        ([0.5, *LABELS[1:]], "row 0: 'label' is 0.5, a fraction rather than a class"),
        ([None, *LABELS[1:], None], "row 0: 'label' is None, a missing label, as in 2 of 21 rows"),
        ([0.0, float("nan"), 1.0], "row 1: 'label' is nan, a missing label, as in 1 of 3 rows"),
        ([b"\\x00", b"\\x01"], "label_column 'label' is Value.'binary'"),
        (["a", "", "b"], "a class is called ''. Give it a printable name"),
        (["a", " \t", "b"], r"a class is called ' \\t'. Give it a printable name"),
        (["a", "b\x1b[2J"], r"a class is called 'b\\x1b"),
    ],
)
def test_labels_that_are_no_classes_are_told_in_one_line(labels, message):
    with pytest.raises(StreamError, match=message) as told:
        TaskStream.class_incremental(rows(labels), num_tasks=1, test_size=0)
    assert "\n" not in str(told.value)


def encoded():
    file = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("column", ["image", "scan"])
@pytest.mark.parametrize(
    "value", ["https://example.com/1.png", "s3://bucket/1.png", "data:image/png;base64,AAAA", None]
)
def test_text_in_place_of_pictures_is_told(value, column, cast):
    value = value or base64.b64encode(encoded()).decode()
    data = Dataset.from_dict({column: [value] * 4, "label": [0, 1] * 2})
    data = data.cast_column(column, Image()) if cast else data
    with pytest.raises(StreamError, match="download the images first|as base64 text") as told:
        load_task(DatasetDict(train=data), "text", image_column=column)
    assert repr(column) in str(told.value) and len(str(told.value)) < 500


def test_the_usual_image_column_is_looked_at_when_none_holds_images():
    data = Dataset.from_dict({"img": ["https://example.com/1.png"] * 2, "label": [0, 1]})
    with pytest.raises(StreamError, match="column 'img' is .* not images. It holds URLs"):
        load_task(data, "text")
    with pytest.raises(StreamError, match="'images' is List.* One image per row is needed"):
        load_task(Dataset.from_dict({"images": [pictures(2)] * 2, "label": [0, 1]}), "several")


@pytest.mark.parametrize("column", ["row", "pixels"])
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_may_be_called_anything(column, streaming, backbone, tmp_path):
    names = {"label": [0, 1] * 4}
    if streaming:
        for split in ("train", "test"):
            rows([0, 1] * 4, column, domain=["x"] * 8).to_parquet(tmp_path / f"{split}.parquet")
    else:
        names = rows([0, 1] * 4, column, domain=["x"] * 8)
    stream = TaskStream.domain_incremental(
        str(tmp_path) if streaming else names, label_column=column, streaming=streaming
    )
    assert stream.classes == ["0", "1"]
    assert open_images(stream[0].train, backbone.transform).labels.tolist().count(1) in (3, 4)


def test_hidden_test_labels_leave_the_split_to_another_one(caplog):
    hidden, full = named([-1] * 8), named(LABELS)
    splits = {"train": full, "test": hidden, "validation": full}
    (task,) = TaskStream.class_incremental(DatasetDict(splits), num_tasks=1)
    assert "split 'validation'" in task.test.title and len(list(task.test)) == 20
    assert "split 'test' has no labels" in caplog.text
    (task,) = TaskStream.class_incremental(DatasetDict(train=full, test=hidden), num_tasks=1)
    assert len(list(task.test)) == 4  # held out of training
    for nothing in ({}, {"test": hidden.to_iterable_dataset()}):
        with pytest.raises(StreamError, match="has no labelled test split, and a stream cannot be split"):
            TaskStream.class_incremental(IterableDatasetDict(train=full.to_iterable_dataset(), **nothing), num_tasks=1)
    assert load_task(full.to_iterable_dataset(), "untested", test_size=0).test is None
    nothing = rows([None] * 4).cast_column("label", Value("string"))
    strings = rows(["abcd"[label] for label in LABELS])
    (task,) = TaskStream.class_incremental(DatasetDict(train=strings, test=nothing, dev=strings), num_tasks=1)
    assert "split 'dev'" in task.test.title
    with pytest.raises(StreamError, match="split 'test', row 0: 'label' is -1, a missing label, as in 8 of 8 rows"):
        TaskStream.class_incremental(DatasetDict(splits), num_tasks=1, test_split="test")


@pytest.mark.parametrize("split", ["test", "Test", "testing", "eval", "evaluation", "validation", "val", "dev"])
def test_test_splits_are_found_by_their_usual_names(split):
    (task,) = TaskStream.class_incremental(DatasetDict({"train": named(LABELS), split: named(LABELS)}), num_tasks=1)
    assert repr(split) in task.test.title


@pytest.mark.parametrize("test", [rows(["a", "b", "d"]), named([2, 0, 1], "bda"), named([0, 1, 3])])
def test_a_test_split_may_lack_a_class_and_order_its_names_otherwise(test):
    train = rows(["abcd"[label] for label in LABELS])
    first, second = TaskStream.class_incremental(DatasetDict(train=train, test=test), num_tasks=2)
    assert first.classes == ("a", "b") and sorted(positions(first.test)) == [0, 1]
    assert second.classes == ("c", "d") and positions(second.test) == [1]


def test_names_that_may_mean_the_same_are_asked_about(caplog):
    stream = TaskStream.class_incremental(rows(["Zero", "zero", "one"] * 4), num_tasks=3)
    assert len(stream.classes) == 3
    assert "'Zero' and 'zero' differ only in case or spaces" in caplog.text and "'one'" not in caplog.text
    with pytest.raises(StreamError, match="class_order names the class 'one' twice"):
        TaskStream.class_incremental(rows(["one", "zero"] * 4), num_tasks=2, class_order=["one", "one"])


def uneven():
    return named([0] * 60 + [1] * 3 + [2] * 2 + [3])


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_in_a_sample(seed):
    labels = np.array(uneven()["label"])
    drawn = sample_rows(labels, 4, seed)
    assert sorted(labels[drawn]) == [0, 1, 2, 3] and len(set(drawn.tolist())) == 4
    many = sample_rows(labels, 40, seed)
    assert set(labels[many]) == {0, 1, 2, 3} and len(set(many.tolist())) == 40


def test_a_sample_that_has_every_class_is_drawn_as_ever():
    labels = np.arange(100) % 4
    assert sample_rows(labels, 50, 7).tolist() == sorted(np.random.default_rng(7).choice(100, 50, replace=False))


def test_first_rows_of_a_stream_make_room_for_every_class():
    assert first_of_each("aaabaac", "abc", 4) == ([0, 1, 3, 6], set("abc"))
    assert first_of_each(iter("abcd" + "a" * 9), "abcd", 6)[0] == [0, 1, 2, 3, 4, 5]
    assert first_of_each("aaab", "abz", 3) == ([0, 1, 3], set("ab"))


def generated(labels):
    yield from ({"image": {"bytes": encoded(), "path": None}, "label": label} for label in labels)


@pytest.mark.parametrize("kind", ["whole", "parquet", "generator"])
def test_samples_of_tasks_have_every_class_or_are_refused(kind, tmp_path):
    data, options = uneven(), {}
    if kind == "parquet":
        for split in ("train", "test"):
            data.to_parquet(tmp_path / f"{split}.parquet")
        data, options = str(tmp_path), {"streaming": True}
    elif kind == "generator":
        source = IterableDataset.from_generator(
            generated, features=uneven().features, gen_kwargs={"labels": tuple(uneven()["label"])}
        )
        data, options = IterableDatasetDict(train=source, test=source), {"streaming": True}
    else:
        data = DatasetDict(train=data, test=data)
    limits = {"max_train_samples_per_task": 4, "max_test_samples_per_task": 5}
    (task,) = TaskStream.class_incremental(data, num_tasks=1, **limits, **options)
    assert sorted(positions(task.train)) == [0, 1, 2, 3]
    assert set(positions(task.test)) == {0, 1, 2, 3} and len(list(task.test)) == 5
    for limit in limits:
        with pytest.raises(StreamError, match="3 images is too small for a task of 4 classes"):
            TaskStream.class_incremental(data, num_tasks=1, **{**limits, limit: 3}, **options)


def test_a_share_is_held_out_of_small_classes_but_never_all_of_one():
    for test_size in (0.2, 0.5, 0.9):
        labels = np.array(uneven()["label"])
        train, test = hold_out(labels, test_size, 0)
        assert set(labels[train]) == {0, 1, 2, 3} and sorted([*train, *test]) == list(range(66))
        assert {1, 2} <= set(labels[test])
    stream = TaskStream.class_incremental(rows(["a", "b", "b"]), num_tasks=2)  # the only image of a class is learnt
    assert [task.test is None for task in stream] == [True, False] and len(list(stream[0].train)) == 1
    assert TaskStream.class_incremental(rows(["a", "b"]), num_tasks=1)[0].test is None
    with pytest.raises(StreamError, match="test_size=1.5 .* cannot be held out"):
        TaskStream.class_incremental(rows(["a", "b"]), num_tasks=1, test_size=1.5)
    with pytest.raises(StreamError, match="test_size=1.0 must be a fraction"):
        TaskStream.from_batches([], lambda images: images, test_size=1.0)


def test_every_class_of_a_task_has_a_label_of_its_own():
    task = load_task(named(LABELS), "four", test_size=0)
    for classes, message in (
        (("a", "b", "c", "d", "e"), "a class without a label"),
        (("a", "b", "c", "a"), "'a' twice"),
    ):
        with pytest.raises(StreamError, match=message):
            replace(task, classes=classes)


def test_a_domain_without_a_class_makes_a_task_without_it(caplog):
    data = pattern_dataset(num_classes=3, domains=["plain", "negative"])
    data["train"] = data["train"].filter(lambda row: (row["label"], row["domain"]) != (2, "plain"))
    first, second = TaskStream.domain_incremental(data, domains=["plain", "negative"])
    assert first.classes == ("class 0", "class 1") and len(second.classes) == 3
    assert set(positions(first.test)) == {0, 1}
    assert "domain plain has no image of class 2" in caplog.text


def test_a_class_without_an_image_that_can_be_read_is_refused_before_it_is_learnt(backbone, tmp_path):
    train = [{"image": {"bytes": encoded(), "path": None}, "label": label} for label in (0, 0, 1)]
    train[2]["image"]["bytes"] = b"no picture"
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_list(train, features).cast_column("image", Image())
    task = load_task(data, "broken", test_size=0)
    for size in (None, 1e-5):
        with pytest.raises(StreamError, match="no decodable image of 1 of 2 classes, .* label=1"):
            open_images(task.train, backbone.transform, max_bad_images=1, cache_size_gb=size)
    source = IterableDataset.from_generator(generated, features=features, gen_kwargs={"labels": (0, 0)})
    source = source.cast_column("image", Image())
    (task,) = TaskStream.class_incremental(IterableDatasetDict(train=source, test=source), num_tasks=1)
    with pytest.raises(StreamError, match="label=1"):
        make_trainer(slda(), tmp_path).learn(task)


def test_a_model_learnt_from_the_smallest_sample_loads(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(num_classes=6), num_tasks=2, max_train_samples_per_task=3)
    make_trainer(s_lora_mix(), tmp_path, num_train_epochs=1).learn_stream(stream)
    assert ContinualModel.from_pretrained(tmp_path).config.classes == stream.classes


def test_a_pinned_commit_is_asked_of_the_benchmarks_own_data_set_alone(hub, monkeypatch, caplog):
    asked, stream = [], TaskStream([load_task(pattern_dataset(), "one")])

    def note(dataset, **options):
        asked.append(options.get("revision"))
        return stream

    for scenario in ("class_incremental", "domain_incremental"):
        monkeypatch.setattr(TaskStream, scenario, note)
    for name in ("split_cifar100", "split_tiny_imagenet", "domainnet", "pacs", "cifar10", "core50", "caltech101"):
        load_benchmark(name)
        load_benchmark(name, dataset="other/copy")
        load_benchmark(name, dataset="other/copy", revision="main")
        load_benchmark(name, dataset=None, revision="v1")
        pin = BENCHMARKS[name].stream.get("revision")
        assert pin is None or len(pin) == 40
        assert asked[-4:] == [pin, None, "main", "v1"]


def test_a_pinned_commit_that_is_gone_is_told_and_done_without(hub, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    file = tmp_path / "train.parquet"
    features = Features({"img": Image(), "label": ClassLabel(names=[str(number) for number in range(5)])})
    data = Dataset.from_dict({"img": pictures(20), "label": [number % 5 for number in range(20)]}, features)
    data.to_parquet(file)
    files = {f"data/{split}-00000-of-00001.parquet": file.read_bytes() for split in ("train", "test")}
    hub.commit("uoft-cs/cifar10", files, repo_type="dataset")
    assert len(load_benchmark("cifar10")) == 5
    assert "no longer has commit 0b2714987fa478483af9968de7c934580d0bb9a2" in caplog.text
    with pytest.raises(StreamError, match="Revision 'v9' doesn't exist"):
        load_benchmark("cifar10", revision="v9")
