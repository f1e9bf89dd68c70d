"""Metrics of a user's own, and pictures for trackers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_trainer
from transformers import EvalPrediction

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    TaskStream,
    TrainerCallback,
    s_lora,
)
from hf_clpeft.training.computed import TAKEN
from hf_clpeft.training.trackers import picture_of


class Logs(TrainerCallback):
    def __init__(self):
        self.values = {}

    def on_log(self, model, values, step):
        self.values |= values


@pytest.fixture(scope="module")
def stream(patterns):
    return TaskStream.class_incremental(patterns, num_tasks=2)


def trainer_with(function, folder, *callbacks, **options):
    made = make_trainer(s_lora(k=2), folder, **options)
    return ContinualTrainer(made.model, made.args, callbacks, compute_metrics=function)


def test_they_are_computed_for_every_task_and_are_in_report_file_and_logs(stream, tmp_path):
    seen, logs = [], Logs()

    def right(found):
        assert isinstance(found, EvalPrediction)
        seen.append(found.predictions.shape)
        return {"right": np.mean(found.predictions.argmax(axis=1) == found.label_ids), "images": len(found.label_ids)}

    report = trainer_with(right, tmp_path, logs).learn_stream(stream)
    assert seen == [(6, 2), (6, 4), (6, 4)]  # images and classes: the first task once, then both
    assert report.computed["right"] == pytest.approx(report.accuracy_matrix[-1])
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["computed"] == {"right": report.computed["right"], "images": [6.0, 6.0]}
    assert logs.values["eval/images"] == 6 and logs.values["eval/right"] == np.mean(report.computed["right"])
    assert ContinualModel.from_pretrained(tmp_path).report.computed == report.computed
    assert report.summary().keys() <= TAKEN
    report.remove_task("task-000")
    assert report.computed == {}


def test_a_task_without_test_images_has_none_and_that_can_be_saved_and_loaded(patterns, tmp_path):
    first, second = TaskStream.class_incremental(patterns, num_tasks=2)
    trainer = trainer_with(lambda found: {"images": len(found.label_ids)}, tmp_path)
    trainer.learn(first)
    report = trainer.learn(replace(second, test=None))
    assert report.computed["images"][0] == 6 and np.isnan(report.computed["images"][1])
    assert np.isnan(ContinualModel.from_pretrained(tmp_path).report.computed["images"][1])
    assert report.means() == {"images": 6.0}


@pytest.mark.parametrize(
    "returned, message",
    [
        (0.5, "return a dict of names"),
        ({"forgetting": 1.0}, "'forgetting', which is measured already; rename yours"),
        ({"a b": 1.0}, "the name 'a b'"),
        ({1: 1.0}, "the name 1"),
        ({"f1": "high"}, "f1='high' for task-000; return a number"),
        ({"f1": np.ones(2)}, "for task-000; return a number"),
    ],
    ids=str,
)
def test_what_is_no_metric_is_refused_and_the_model_stays_as_it_was(returned, message, stream, tmp_path):
    trainer = trainer_with(lambda found: returned, tmp_path, num_train_epochs=1)
    with pytest.raises(ConfigError, match=message):
        trainer.learn(stream[0])
    assert not trainer.model.config.tasks and not (tmp_path / "config.json").exists()


def test_what_cannot_be_called_is_refused_at_once(tmp_path):
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    with pytest.raises(TypeError, match="compute_metrics='f1' is not callable"):
        ContinualTrainer(model, ContinualTrainingArguments(str(tmp_path)), compute_metrics="f1")


def test_trackers_get_the_picture_of_every_task(stream, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = make_trainer(s_lora(k=2), tmp_path, report_to="tensorboard").learn_stream(stream)
    events = EventAccumulator(str(tmp_path / "hf_clpeft")).Reload()
    pictures = events.Images("eval/accuracy_and_routing")
    assert len(pictures) == 2
    height, width, _ = picture_of(report).shape
    assert (pictures[-1].height, pictures[-1].width) == (height, width)
