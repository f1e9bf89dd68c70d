"""Streams that no disk has to hold: every image once an epoch, in an order that goes on exactly where it was left."""

import io
import json
import os
import random
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import BACKBONE, OnStep, make_trainer, outcome, pattern_dataset
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, IterableDatasetDict
from PIL import Image as Pillow

from hf_clpeft import ContinualModel, ContinualTrainer, TaskStream, l2l, s_lora, s_lora_mix, sequential_lora
from hf_clpeft.streams import StreamedImages, StreamError, TaskImages, open_images, streamed


pytestmark = pytest.mark.usefixtures("shallow")
SOAK_ROWS = int(os.environ.get("HF_CLPEFT_SOAK_ROWS", 8_000))
NO_ROOM = 1e-4  # GB: 32 images of the tiny backbone
FEATURES = Features({"image": Image(decode=False), "label": ClassLabel(names=["even", "odd"])})


def rows_of(parts, count, shards, broken):
    for part in parts:
        for number in range(part, count, shards):
            colour = (number % 256, number // 256 % 256, number // 65536)
            file = io.BytesIO()
            Pillow.new("RGB", (8, 8), colour).save(file, "bmp")
            encoded = b"no picture" if number in broken else file.getvalue()
            yield {"image": {"bytes": encoded, "path": None}, "label": number % 2}


def made_on_the_fly(count, shards=4, broken=()):
    """A split that comes out of a function; the colour of an image says which it is."""
    settings = {"parts": list(range(shards)), "count": count, "shards": shards, "broken": broken}
    source = IterableDataset.from_generator(rows_of, features=FEATURES, gen_kwargs=settings)
    source = source.cast_column("image", Image())
    return TaskStream.class_incremental(IterableDatasetDict(train=source, test=source), num_tasks=1)[0].train


def numbers(batches):
    found = []
    for batch, _ in batches:
        found += (batch["pixels"][:, :, 0, 0].numpy().astype(int) @ [1, 256, 65536]).tolist()
    return found


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streamed, "BUFFER_SIZE", 32)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s at the end of each Parquet stream


def test_what_fits_is_kept_on_disk_and_what_does_not_is_read_with_a_sample_of_each_class(backbone, small_blocks):
    split = made_on_the_fly(300)
    assert isinstance(open_images(split, backbone.transform, cache_size_gb=1.0), TaskImages)
    images = open_images(split, backbone.transform, cache_size_gb=NO_ROOM)
    assert isinstance(images, StreamedImages) and len(images) == 300
    assert np.bincount(images.sample.labels).tolist() == [16, 16]
    with pytest.raises(StreamError, match="holds 1 resized images, fewer than there are classes"):
        open_images(split, backbone.transform, cache_size_gb=4e-6)


@pytest.mark.parametrize("on_disk", [True, False])
def test_an_epoch_has_every_image_once_in_an_order_of_its_own(on_disk, backbone, small_blocks):
    split = made_on_the_fly(300)
    if on_disk:
        split = streamed.replace(split, dataset=Dataset.from_list(list(split.dataset), split.dataset.features))
    images = open_images(split, backbone.transform, cache_size_gb=NO_ROOM)
    epochs = [numbers(images.read(8, seed=0, epoch=epoch)) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(300))
    assert epochs[0] != epochs[1] and epochs[0] == numbers(images.read(8, seed=0, epoch=0))
    assert np.abs(np.diff(epochs[0])).mean() > 5  # neighbours are no neighbours any more


@pytest.mark.parametrize("on_disk", [True, False])
def test_it_goes_on_exactly_where_it_was_left(on_disk, backbone, small_blocks, tmp_path):
    split = made_on_the_fly(300, shards=7)
    if on_disk:
        rows = Dataset.from_list([{"image": row["image"], "label": row["label"]} for row in split.dataset])
        rows = rows.cast(Features({**FEATURES, "image": Image()}))
        for part in range(3):
            rows.shard(3, part).to_parquet(tmp_path / f"train-{part}-of-3.parquet", batch_size=20)
        split = TaskStream.class_incremental(str(tmp_path), num_tasks=1, streaming=True, test_split="train")[0].train
    images = open_images(split, backbone.transform, cache_size_gb=NO_ROOM)
    whole = list(images.read(8, seed=0, epoch=3))
    for stop in random.Random(0).sample(range(1, len(whole)), 10):
        position = json.loads(json.dumps(whole[stop - 1][1]))
        again = images.read(8, seed=0, epoch=3, position=position)
        assert numbers(whole[:stop]) + numbers(again) == numbers(whole)


def test_memory_stays_flat_and_the_order_exact_over_a_long_stream(backbone):
    images = open_images(made_on_the_fly(SOAK_ROWS, shards=16), backbone.transform, cache_size_gb=NO_ROOM)
    process, sizes, seen, positions = psutil.Process(), [], [], []
    for number, (batch, position) in enumerate(images.read(100, seed=0, epoch=0)):
        seen.append(np.array(numbers([(batch, None)]), dtype=np.int32))
        if number % 10 == 0:
            sizes.append(process.memory_info().rss)
        if number % max(1, SOAK_ROWS // 1000) == 7:
            positions.append((number + 1, position))
    order = np.concatenate(seen)
    assert np.array_equal(np.sort(order), np.arange(SOAK_ROWS))
    warm = sizes[len(sizes) // 4]  # by then, blocks have come and gone
    growth = (max(sizes) - warm) / 1e6
    for number, position in random.Random(0).sample(positions, 10):
        again = images.read(100, seed=0, epoch=0, position=json.loads(json.dumps(position)))
        following = numbers(islice(again, 30))
        assert following == order[number * 100 :][: len(following)].tolist()
    print(f"{SOAK_ROWS} rows: resident memory grew {growth:.1f} MB after the first quarter")
    assert growth < 50


@pytest.mark.parametrize("shards", [4, 3])
def test_processes_share_the_batches_of_one(shards, backbone, small_blocks):
    images = open_images(made_on_the_fly(300, shards), backbone.transform, cache_size_gb=NO_ROOM)
    for epoch in (0, 1):
        shares = [numbers(images.read(8, 0, epoch, rank=rank, num_processes=2)) for rank in (0, 1)]
        assert sorted(shares[0] + shares[1]) == list(range(300))
        alone = images.read(8, 0, epoch)
        together = zip(*(images.read(8, 0, epoch, rank=rank, num_processes=2) for rank in (0, 1)), strict=True)
        for batch, parts in zip(alone, together, strict=True):
            assert numbers([batch]) == numbers(parts)


def test_unreadable_images_are_left_out_up_to_a_limit(backbone, small_blocks):
    split = made_on_the_fly(300, broken=(7, 8, 250))
    images = open_images(split, backbone.transform, cache_size_gb=NO_ROOM, max_bad_images=3)
    whole = list(images.read(8, seed=0, epoch=0))
    assert sorted(numbers(whole)) == [number for number in range(300) if number not in (7, 8, 250)]
    images.max_bad_images = 2
    with pytest.raises(StreamError, match=r"row \d+: the image cannot be decoded .* max_bad_images=2"):
        list(images.read(8, seed=0, epoch=0, position=whole[5][1]))


def test_parquet_files_are_not_read_where_they_have_nothing_of_a_task(tmp_path):
    names = ["a", "b", "c"]
    rows = [{"image": Pillow.new("RGB", (64, 64), (i, 0, 0)), "label": i // 20} for i in range(60)]
    dataset = Dataset.from_list(rows, Features({"image": Image(), "label": ClassLabel(names=names)}))
    for split in ("train", "test"):
        dataset.to_parquet(tmp_path / f"{split}.parquet", batch_size=20)
    file = tmp_path / "train.parquet"
    groups = pq.ParquetFile(file).metadata
    assert groups.num_row_groups == 3
    column = groups.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    file.write_bytes(content)  # who reads the images of class b stumbles
    tasks = TaskStream.class_incremental(
        str(tmp_path), num_tasks=3, streaming=True, class_order=["a", "c", "b"], label_column="label"
    )[:2]
    assert [len(list(task.train)) for task in tasks] == [20, 20]


STREAM = {"cache_size_gb": 2e-5, "train_batch_size": 5, "save_steps": 2, "resume_from_checkpoint": "auto"}


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(per_class=12), num_tasks=2)


@pytest.mark.parametrize("method", [s_lora(k=2), s_lora_mix(), l2l(pool_size=4, top_n=2)], ids=lambda m: m.name)
def test_a_run_on_streamed_images_that_died_ends_like_one_that_did_not(method, stream, tmp_path):
    report = make_trainer(method, tmp_path / "whole", **STREAM).learn_stream(stream)
    assert report.summary()["average_accuracy"] > 0.5
    for stop_after in (3, 8):
        folder, steps = tmp_path / f"pieces-{stop_after}", []

        def die(done, total, steps=steps, stop_after=stop_after):
            steps.append(done)
            if len(steps) == stop_after:
                raise RuntimeError("killed")

        trainer = make_trainer(method, folder, **STREAM, callbacks=[OnStep(die)])
        with pytest.raises(RuntimeError, match="killed"):
            trainer.learn_stream(stream)
        there = Path(folder, "config.json").is_file()
        model = ContinualModel.from_pretrained(folder) if there else ContinualModel.from_backbone(BACKBONE, method)
        ContinualTrainer(model, trainer.args).learn_stream(stream)
        assert outcome(folder) == outcome(tmp_path / "whole")


def test_what_trains_on_all_tasks_at_once_needs_no_more_room_for_its_images(stream, tmp_path):
    report = make_trainer(sequential_lora(), tmp_path, **STREAM, learning_rate=1e-2).learn_stream(stream.joined())
    assert report.summary()["average_accuracy"] > 0.5
