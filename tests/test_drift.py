"""Borders between tasks that nobody has drawn."""

import numpy as np
import pytest
from conftest import BACKBONE, make_trainer, pattern_dataset

from hf_clpeft import ConfigError, TaskStream, load_backbone, s_lora
from hf_clpeft.streams.drift import DriftDetector


def cloud(rng, place, count):
    return rng.normal(0, 1, (count, 8)) + 5 * np.eye(8)[place]


def test_a_new_task_is_seen_after_a_few_images_and_where_it_began_is_told():
    for seed in range(20):
        rng, detector = np.random.default_rng(seed), DriftDetector(seed=seed)
        assert detector.update(cloud(rng, 0, 500)) is None
        drift = detector.update(cloud(rng, 1, 100))
        assert drift.after <= 12 and abs(drift.since - drift.after) <= 6


def test_false_alarms_are_as_rare_as_stated():
    waits, every = [], 200
    for seed in range(40):
        rng, detector = (
            np.random.default_rng(seed),
            DriftDetector(reference_size=40, false_alarm_every=every, seed=seed),
        )
        detector.update(cloud(rng, 0, 40))
        drift = detector.update(cloud(rng, 0, 5 * every))
        waits.append(5 * every if drift is None else drift.after)
    assert np.mean(waits) >= every


def test_the_same_images_at_once_or_one_by_one_are_the_same():
    images = np.concatenate([cloud(np.random.default_rng(0), place, 200) for place in (0, 1)])
    whole, single = DriftDetector(), DriftDetector()
    at_once = whole.update(images)
    alone = next(i for i, row in enumerate(images, start=1) if single.update(row[None]) is not None)
    assert at_once.after == alone


@pytest.mark.parametrize("options", [{"reference_size": 10}, {"false_alarm_every": 1}])
def test_a_detector_that_cannot_work_is_refused(options):
    with pytest.raises(ValueError, match="must be"):
        DriftDetector(**options)


def test_tasks_are_learnt_as_they_are_found(tmp_path):
    rows = pattern_dataset(num_classes=4, per_class=60)["train"]
    halves = [rows.filter(lambda row, half=half: row["label"] // 2 == half).shuffle(seed=0) for half in (0, 1)]
    batches = (
        {
            "image": half["image"][start : start + 7],
            "label": [f"class {label}" for label in half["label"][start : start + 7]],
        }
        for half in halves
        for start in range(0, len(half), 7)
    )
    stream = TaskStream.from_batches(batches, load_backbone(BACKBONE).features, DriftDetector(reference_size=40))
    trainer = make_trainer(s_lora(k=2), tmp_path, num_train_epochs=1)
    trainer.learn_stream(stream)
    first, second = trainer.model.config.tasks
    assert {"class 0", "class 1"} <= set(first.classes) and {"class 2", "class 3"} <= set(second.classes)
    assert abs(first.num_train_images - second.num_train_images) <= 4  # borders are found to an image or two


def test_what_must_know_all_tasks_beforehand_is_refused(tmp_path):
    stream = TaskStream.from_batches([], lambda images: np.zeros((len(images), 8)))
    with pytest.raises(ConfigError, match="must know all tasks beforehand"):
        make_trainer(s_lora(), tmp_path, task_parallel=True).learn_stream(stream)
