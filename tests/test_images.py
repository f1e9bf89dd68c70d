"""Decoding, resizing, caching, augmenting."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image
from PIL import Image as PILImage

from hf_clpeft import StreamError, TaskStream
from hf_clpeft.streams import cache_images
from hf_clpeft.streams.images import AUGMENTATIONS, augment


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
    monkeypatch.setattr(PILImage, "open", lambda file: decoded.append(file) or original(file))
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


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_image_names_data_set_split_and_row(backbone, patterns, streaming, tmp_path):
    train = patterns["train"].cast_column("image", Image(decode=False)).to_list()
    train[13]["image"]["bytes"] = train[13]["image"]["bytes"][:60]  # truncated
    broken = Dataset.from_list(train, features=patterns["train"].features)
    DatasetDict(train=broken, test=patterns["test"])["train"].to_parquet(tmp_path / "data" / "train.parquet")
    patterns["test"].to_parquet(tmp_path / "data" / "test.parquet")
    stream = TaskStream.class_incremental(str(tmp_path / "data"), num_tasks=2, streaming=streaming)
    cache_images(stream[0].train, backbone.transform)
    with pytest.raises(StreamError, match=r"split 'train', row 13: the image cannot be decoded"):
        cache_images(stream[1].train, backbone.transform)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_augmented_views_keep_shape_and_range(augmentation):
    torch.manual_seed(0)
    pixels = torch.rand(64, 3, 16, 16)
    views = augment(pixels, augmentation)
    assert views.shape == pixels.shape and views.min() >= 0 and views.max() <= 1
    if augmentation == "flip":
        mirrored = (views - pixels.flip(-1)).abs().amax(dim=(1, 2, 3)) < 1e-5
        kept = (views - pixels).abs().amax(dim=(1, 2, 3)) < 1e-5
        assert (mirrored ^ kept).all() and 16 < mirrored.sum() < 48
