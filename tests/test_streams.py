"""Tasks out of data sets, and what is said when there are none in them."""

from pathlib import Path

import numpy as np
import pytest
from conftest import make_trainer, pattern_dataset, pattern_rows
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDatasetDict
from huggingface_hub import HfApi

from hf_clpeft import (
    ContinualModel,
    ContinualTrainer,
    StreamError,
    TaskStream,
    linear_probe,
    load_benchmark,
    load_task,
)
from hf_clpeft.streams import BENCHMARKS


def labels_of(split):
    return sorted({label for _, label, _ in split})


def rows_of(split):
    return [row for _, _, row in split]


def test_class_incremental_tasks_share_out_all_classes_and_images(patterns):
    stream = TaskStream.class_incremental(patterns, num_tasks=2)
    assert [task.classes for task in stream] == [("class 0", "class 1"), ("class 2", "class 3")]
    assert stream.scenario == "class"
    assert sorted(rows_of(stream[0].train) + rows_of(stream[1].train)) == list(range(24))
    assert labels_of(stream[1].test) == [0, 1]  # positions in the task's own classes


def test_a_seed_fixes_the_order_of_classes_as_the_literature_shuffles_it(patterns):
    stream = TaskStream.class_incremental(patterns, num_tasks=2, seed=1993)
    expected = [f"class {i}" for i in np.random.RandomState(1993).permutation(4)]
    assert stream.classes == expected
    assert TaskStream.class_incremental(patterns, num_tasks=2, class_order=expected).classes == expected


def test_domain_incremental_tasks_bring_the_same_classes_in_new_domains():
    data = pattern_dataset(domains=["plain", "negative"])
    stream = TaskStream.domain_incremental(data, domains=["plain", "negative"])
    assert [task.domain for task in stream] == ["plain", "negative"]
    assert stream[0].classes == stream[1].classes == tuple(stream.classes)
    assert set(rows_of(stream[0].train)).isdisjoint(rows_of(stream[1].train))


def test_test_domains_are_dealt_out_so_that_every_image_is_judged_once():
    data = pattern_dataset(domains=["a", "b", "negative"])
    stream = TaskStream.domain_incremental(data, domains=["a", "b"], test_domains=["negative"])
    rows = [rows_of(task.test) for task in stream]
    assert sorted(rows[0] + rows[1]) == [i for i, d in enumerate(data["test"]["domain"]) if d == "negative"]
    assert labels_of(stream[0].test) == labels_of(stream[1].test) == [0, 1, 2, 3]


def test_test_domains_need_test_images():
    data = DatasetDict(train=pattern_dataset(domains=["plain", "negative"])["train"])
    with pytest.raises(StreamError, match="test_domains needs test images; leave out test_size=0"):
        TaskStream.domain_incremental(data, domains=["plain"], test_domains=["negative"], test_size=0)


def test_images_per_task_can_be_limited_and_are_drawn_by_seed(patterns):
    first, again = (TaskStream.class_incremental(patterns, num_tasks=2, max_train_samples_per_task=5) for _ in "ab")
    assert len(rows_of(first[0].train)) == 5
    assert rows_of(first[0].train) == rows_of(again[0].train)


def test_without_a_test_split_a_share_of_every_class_is_held_out(patterns):
    stream = TaskStream.class_incremental(DatasetDict(train=patterns["train"]), num_tasks=2, test_size=0.5)
    for task in stream:
        assert set(rows_of(task.train)).isdisjoint(rows_of(task.test))
        assert labels_of(task.test) == labels_of(task.train) == [0, 1]
    assert sum(len(rows_of(task.test)) for task in stream) == 12


def test_parquet_image_folder_and_streaming_give_the_same_tasks(patterns, tmp_path):
    for side in ("train", "test"):
        patterns[side].to_parquet(tmp_path / "parquet" / "data" / f"{side}-00000-of-00001.parquet")
        for i, row in enumerate(patterns[side]):
            folder = tmp_path / "folder" / side / f"class {row['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i:03d}.png")
    streams = [
        TaskStream.class_incremental(patterns, num_tasks=2),
        TaskStream.class_incremental(str(tmp_path / "parquet"), num_tasks=2),
        TaskStream.class_incremental(str(tmp_path / "parquet"), num_tasks=2, streaming=True),
        TaskStream.class_incremental(str(tmp_path / "folder"), num_tasks=2),
    ]
    for stream in streams:
        assert stream.classes == streams[0].classes
        for task, expected in zip(stream, streams[0], strict=True):
            assert [label for _, label, _ in task.train] == [label for _, label, _ in expected.train]
            assert rows_of(task.test) == rows_of(expected.test)


def test_columns_are_found_by_type_and_usual_name_or_given(patterns):
    renamed = patterns.rename_columns({"image": "img", "label": "fine_label"})
    assert len(TaskStream.class_incremental(renamed, num_tasks=2)) == 2
    odd = patterns.rename_columns({"label": "species"}).cast_column("domain", ClassLabel(names=["plain"]))
    with pytest.raises(StreamError, match=r"split 'train'.*label_column to one of \['image', 'species', 'domain'\]"):
        TaskStream.class_incremental(odd, num_tasks=2)
    assert len(TaskStream.class_incremental(odd, num_tasks=2, label_column="species")) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "picture"}, "no column 'picture'"),
        ({"image_column": "domain"}, "not images. Cast it"),
        ({"label_column": "kind"}, "no column 'kind'"),
        ({"num_tasks": 5}, "4 classes cannot make num_tasks=5"),
        ({"class_order": ["class 0", "cat"], "num_tasks": 1}, "no class 'cat'"),
        ({"train_split": "training"}, "no split 'training'"),
    ],
)
def test_bad_options_name_the_place_and_the_way_out(patterns, options, message):
    with pytest.raises(StreamError, match=message):
        TaskStream.class_incremental(patterns, **{"num_tasks": 2, **options})


def test_a_task_may_keep_all_images_for_training():
    rows = Dataset.from_dict({"image": pattern_rows(1)["image"], "label": ["cat"] * 6})
    task = load_task(DatasetDict(train=rows), name="cats", test_size=0)
    assert task.classes == ("cat",) and task.test is None and len(list(task.train)) == 6


def test_a_folder_with_one_class_folder_is_one_class_and_one_with_none_is_refused(patterns, tmp_path):
    for place in ("new/robin", "flat"):
        Path(place).mkdir(parents=True)
        for i in range(3):
            patterns["train"][i]["image"].save(Path(place, f"{i}.png"))
    assert load_task("new", name="october", test_size=0).classes == ("robin",)
    with pytest.raises(StreamError, match="flat has images but no class folders: .* flat/robin/1.jpg"):
        load_task("flat", name="october", test_size=0)


def test_a_data_set_that_is_nowhere_is_refused(hub, monkeypatch):
    neither = "is neither a folder of images nor a data set on the Hub"
    for name, message in (
        ("my/pictures", f"'my/pictures' {neither}: .* There is no such folder here.$"),
        ("pictures", f"'pictures' {neither}. There is no such folder here.$"),
        ("pictures/*", r"There is no folder 'pictures/\*', and it is not a valid Hub id"),
        ("my pictures", "There is no folder 'my pictures', and it is not a valid Hub id"),
        ("./pictures", "There is no folder './pictures'"),
    ):
        with pytest.raises(StreamError, match=message):
            load_task(name, name="birds")
    monkeypatch.setattr(
        HfApi, "dataset_info", lambda *_, **options: (_ for _ in ()).throw(ConnectionError("no network"))
    )
    hub.log.clear()
    with pytest.raises(StreamError, match="There is no folder 'pictures' here, and the Hub cannot be asked"):
        load_task("pictures", name="birds")
    assert not hub.log  # which is asked again and again for half a minute otherwise


def test_an_empty_task_is_refused():
    data = pattern_dataset(domains=["plain", "negative"])
    data["test"] = data["test"].filter(lambda row: row["domain"] == "plain")
    with pytest.raises(StreamError, match="split 'test' has no domain 'negative'"):
        TaskStream.domain_incremental(data)


def test_a_missing_label_names_its_row(patterns):
    labels = patterns["train"]["label"][:]
    labels[7] = None
    train = Dataset.from_dict({"image": pattern_rows()["image"], "label": labels})
    with pytest.raises(StreamError, match="split 'train', row 7: 'label' is None"):
        TaskStream.class_incremental(DatasetDict(train=train, test=patterns["test"]), num_tasks=2)


def test_a_class_that_is_only_tested_on_names_the_row(patterns):
    data = DatasetDict(train=patterns["train"].filter(lambda row: row["label"] != 3), test=patterns["test"])
    with pytest.raises(StreamError, match=r"split 'test', row 9: class 'class 3' has no image in .*split 'train'"):
        TaskStream.class_incremental(data, num_tasks=1)


def test_core50_without_its_session_column_is_refused(patterns):
    data = DatasetDict({"train+test": patterns["train"]})
    with pytest.raises(StreamError, match="no column 'session'"):
        load_benchmark("core50", dataset=data)


def test_tasks_of_one_name_are_refused(patterns):
    task = load_task(patterns, name="twin")
    with pytest.raises(StreamError, match="same name"):
        TaskStream([task, task])


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_joined_tasks_are_one_with_all_images_and_classes(scenario):
    if scenario == "class":
        stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2, seed=1993)
    else:
        stream = TaskStream.domain_incremental(pattern_dataset(domains=["plain", "negative"]))
    (task,) = stream.joined()
    assert task.classes == tuple(stream.classes) and task.domain is None
    for side in ("train", "test"):
        apart = [(row, each.classes[label]) for each in stream for _, label, row in getattr(each, side)]
        assert [(row, task.classes[label]) for _, label, row in getattr(task, side)] == apart
    again = stream.joined()[0]
    assert again.train.dataset._fingerprint == task.train.dataset._fingerprint  # so that its pixels are cached once
    assert stream.joined().name == f"{stream.name}, joined" and stream.joined().scenario == "class"


def test_tasks_of_different_data_sets_are_joined_by_the_names_of_their_classes(patterns):
    others = pattern_dataset().rename_columns({"image": "img"})
    others = others.cast_column("label", ClassLabel(names=["class 3", "dog", "cat", "ox"]))
    stream = TaskStream([load_task(patterns, name="first"), load_task(others, name="second", domain="paintings")])
    (task,) = stream.joined()
    assert task.classes == ("class 0", "class 1", "class 2", "class 3", "dog", "cat", "ox")
    apart = [each.classes[label] for each in stream for _, label, _ in each.train]
    assert [task.classes[label] for _, label, _ in task.train] == apart and len(apart) == 48
    pictures = [image["bytes"] for each in stream for image, _, _ in each.train]
    assert [image["bytes"] for image, _, _ in task.train] == pictures


def test_what_is_not_there_is_not_joined(patterns):
    untested = TaskStream.class_incremental(DatasetDict(train=patterns["train"]), num_tasks=2, test_size=0)
    assert untested.joined()[0].test is None
    streamed = IterableDatasetDict({side: rows.to_iterable_dataset() for side, rows in patterns.items()})
    with pytest.raises(StreamError, match="split 'train' is streamed, and streams cannot be joined"):
        TaskStream.class_incremental(streamed, num_tasks=2).joined()


def test_a_joined_stream_is_learnt_goes_on_and_is_the_ceiling(patterns):
    stream = TaskStream.class_incremental(patterns, num_tasks=2).joined()
    report = make_trainer(linear_probe(), "out").learn_stream(stream)
    assert report.summary()["average_accuracy"] == 1 and len(report.tasks) == 1
    resumed = ContinualTrainer(ContinualModel.from_pretrained("out"), make_trainer(linear_probe(), "out").args)
    assert resumed.learn_stream(stream).accuracy_matrix == report.accuracy_matrix


def test_every_benchmark_says_where_its_protocol_comes_from():
    assert set(BENCHMARKS) >= {"split_cifar100", "split_tiny_imagenet", "domainnet", "core50", "pacs", "digits"}
    for benchmark in BENCHMARKS.values():
        assert len(benchmark.protocol) > 40


def test_digits_have_five_tasks_and_four_domains():
    digits = load_benchmark("digits")
    assert len(digits) == 5 and sum(len(rows_of(task.train)) for task in digits) == 1437
    domains = load_benchmark("digits_domains")
    assert [task.domain for task in domains] == ["scanned", "inverted", "rotated", "textured"]
    assert sum(len(rows_of(task.test)) for task in domains) == 360


def test_images_stay_encoded_until_they_are_cached(patterns):
    encoded, _, _ = next(iter(TaskStream.class_incremental(patterns, num_tasks=2)[0].train))
    assert set(encoded) == {"bytes", "path"}
    assert isinstance(patterns["train"].features["image"], Image)
