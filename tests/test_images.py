"""Decoding, resizing, caching, augmenting."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from hf_clpeft import StreamError, TaskStream
from hf_clpeft.streams import cache_images
from hf_clpeft.streams.images import open_image


def test_resizing_then_normalising_is_what_the_processor_does(backbone):
    image = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    expected = backbone.processor([image], return_tensors="pt").pixel_values
    ours = backbone.transform.normalize(torch.from_numpy(backbone.transform.resize([image])))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_cached_images_come_in_batches_with_labels_and_positions(backbone, patterns):
    task = TaskStream.class_incremental(patterns, num_tasks=2)[1]
    images = cache_images(task.train, backbone.transform)
    batch = images.__getitems__([11, 0])
    assert batch["pixels"].shape == (2, 3, 32, 32) and batch["pixels"].dtype == torch.uint8
    assert batch["label"].tolist() == [1, 0] and batch["index"].tolist() == [11, 0]
    first = patterns["train"][12]["image"]  # the task's first image: class 2 starts at row 12
    assert np.array_equal(batch["pixels"][1], np.asarray(first).transpose(2, 0, 1))


def test_a_second_run_finds_the_cache_and_decodes_nothing(backbone, patterns, tmp_path, monkeypatch):
    folder = tmp_path / "parquet"
    for side in ("train", "test"):
        patterns[side].to_parquet(folder / f"{side}.parquet")
    decoded = []
    original = PILImage.open
    monkeypatch.setattr(PILImage, "open", lambda file, **options: decoded.append(file) or original(file))
    for _ in range(2):
        task = TaskStream.class_incremental(str(folder), num_tasks=2)[0]
        images = cache_images(task.train, backbone.transform)
        assert images.dataset.cache_files
    assert len(decoded) == len(images)


def test_streamed_images_are_the_same_as_downloaded_ones(backbone, patterns, tmp_path):
    for side in ("train", "test"):
        patterns[side].to_parquet(tmp_path / "data" / f"{side}.parquet")
    caches = [
        cache_images(
            TaskStream.class_incremental(str(tmp_path / "data"), num_tasks=2, streaming=streaming)[1].test,
            backbone.transform,
        )
        for streaming in (False, True)
    ]
    assert caches[0].dataset["pixels"][:] == caches[1].dataset["pixels"][:]
    assert caches[0].labels.tolist() == caches[1].labels.tolist()


@pytest.fixture
def broken(patterns, tmp_path):
    """Folder of a data set in which rows 13 and 14, of the second task, are truncated."""
    train = patterns["train"].cast_column("image", Image(decode=False)).to_list()
    for row in (13, 14):
        train[row]["image"]["bytes"] = train[row]["image"]["bytes"][:60]
    Dataset.from_list(train, features=patterns["train"].features).to_parquet(tmp_path / "data" / "train.parquet")
    patterns["test"].to_parquet(tmp_path / "data" / "test.parquet")
    return str(tmp_path / "data")


@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_images_name_data_set_split_and_rows(backbone, broken, streaming):
    stream = TaskStream.class_incremental(broken, num_tasks=2, streaming=streaming)
    cache_images(stream[0].train, backbone.transform)
    message = r"split 'train', row 13: the image cannot be decoded .*row 14: .*These are 2 of 12 images"
    with pytest.raises(StreamError, match=message):
        cache_images(stream[1].train, backbone.transform, max_bad_images=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_as_many_unreadable_images_as_allowed_are_left_out(backbone, broken, streaming, caplog):
    stream = TaskStream.class_incremental(broken, num_tasks=2, streaming=streaming)
    with caplog.at_level(logging.WARNING):
        images = cache_images(stream[1].train, backbone.transform, max_bad_images=2)
    assert "Skipping 2 of 12 images" in caplog.text and "row 14" in caplog.text
    assert len(images) == 10 and images.labels.min() == 0
    whole = [open_image(encoded) for encoded, _, row in stream[1].train if row not in (13, 14)]
    wanted = torch.from_numpy(backbone.transform.resize(whole))
    assert torch.equal(images.__getitems__(range(10))["pixels"], wanted)
