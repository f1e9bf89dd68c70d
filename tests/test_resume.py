"""Going on where a run, or a model of somebody else, has stopped."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BACKBONE, outcome, pattern_dataset

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    StreamError,
    TaskStream,
    s_lora,
    s_x,
)
from hf_clpeft.training.options import BackboneArguments
from hf_clpeft.training.recipe import learn


pytestmark = pytest.mark.usefixtures("shallow")
METHOD, BARE = s_lora(k=2), BackboneArguments(backbone=BACKBONE)
CLASSES = [f"class {i}" for i in range(6)]
ARGS = ContinualTrainingArguments(
    num_train_epochs=1, train_batch_size=8, disable_tqdm=True, resume_from_checkpoint="auto"
)


@pytest.fixture
def stream():
    return TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)


def tensors(folder):
    return [expert.tensors for expert in ContinualModel.from_pretrained(folder).bank]


def test_a_run_in_pieces_ends_like_a_run_in_one(stream):
    whole = learn(stream, BARE, replace(ARGS, output_dir="whole"), METHOD)
    for count in (1, 3):
        report = learn(stream[:count], BARE, replace(ARGS, output_dir="pieces"), METHOD)
    assert report.tasks == whole.tasks and report.measured() == [0, 1, 2]
    assert json.dumps(report.accuracy_matrix) == json.dumps(whole.accuracy_matrix)
    assert report.routing_confusion == whole.routing_confusion and report.oracle_accuracy == whole.oracle_accuracy
    for one, other in zip(tensors("pieces"), tensors("whole"), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_is_left_as_it_is(stream):
    args = replace(ARGS, output_dir="out")
    first = learn(stream, BARE, args, METHOD)
    files = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}
    assert learn(stream, BARE, args, METHOD).summary() == first.summary()
    assert files == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}


def test_another_machine_goes_on_from_the_hub(hub, stream):
    args = replace(ARGS, output_dir="here", push_to_hub=True, hub_model_id="model", hub_token="hf_alice")
    learn(stream[:2], BARE, args, METHOD)
    shutil.rmtree("here")
    report = learn(stream, BARE, replace(args, output_dir="there"), METHOD)
    assert report.measured() == [0, 1, 2]
    assert len(hub.repo("alice/model").commits()) == 1 + 3 and len(hub.repo("alice/model").tags) == 3
    elsewhere = learn(stream, BARE, replace(ARGS, output_dir="x", resume_from_checkpoint="alice/model"), METHOD)
    assert elsewhere.accuracy_matrix == report.accuracy_matrix


@pytest.mark.parametrize(
    "backbone, method, message",
    [
        (BARE, s_lora(k=3), "out was made with k=2, not 3"),
        (BARE, s_lora(k=2, r=2), "out was made with r=1, not 2"),
        (replace(BARE, image_size=48), METHOD, "out was made with image_size=32, not 48"),
    ],
)
def test_other_options_are_refused(stream, backbone, method, message):
    args = replace(ARGS, output_dir="out")
    learn(stream[:1], BARE, args, METHOD)
    with pytest.raises(ConfigError, match=message):
        learn(stream, backbone, args, method)


def test_another_stream_is_refused(stream):
    args = replace(ARGS, output_dir="out")
    learn(stream[:1], BARE, args, METHOD)
    other = TaskStream.class_incremental(pattern_dataset(6), num_tasks=3, seed=5)
    with pytest.raises(ConfigError, match="has learnt task-000 with the classes .* Go on with the same stream"):
        learn(other, BARE, args, METHOD)


def test_the_token_goes_to_no_tracker(stream, monkeypatch):
    seen = {}
    args = replace(ARGS, output_dir="out", report_to="tensorboard", hub_token="hf_alice")
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda self, name, config: seen.update(config))
    ContinualTrainer(ContinualModel.from_backbone(BACKBONE, METHOD), args)
    assert seen["num_train_epochs"] == 1 and "hf_alice" not in str(seen)


def test_a_run_whose_disk_was_full_says_how_to_go_on(stream, monkeypatch):
    args, write_bytes = replace(ARGS, output_dir="out"), Path.write_bytes

    def full(path, data):
        if "task-001" in str(path):
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="stays as it was: No space left.*--resume_from_checkpoint auto"):
            learn(stream, BARE, args, METHOD)
    assert learn(stream, BARE, args, METHOD).measured() == [0, 1, 2]


def test_a_method_with_sets_and_tuples_is_the_same_method_when_it_comes_back(stream):
    method = s_x(peft={"peft_type": "LORA", "r": 1, "target_modules": {"v_proj", "q_proj"}}, k=1)
    args = replace(ARGS, output_dir="out")
    learn(stream[:1], BARE, args, method)
    other = s_x(peft={"peft_type": "LORA", "r": 1, "target_modules": ("q_proj", "v_proj")}, k=1)
    assert learn(stream[:2], BARE, args, other).measured() == [0, 1]


def test_data_that_vanish_in_the_middle_end_the_run_and_it_goes_on_once_they_are_back(tmp_path):
    data, away = tmp_path / "data", tmp_path / "away"
    for side, rows in pattern_dataset(6).items():
        rows.to_parquet(data / f"{side}.parquet")

    def stream():
        return TaskStream.class_incremental(str(data), num_tasks=3, streaming=True, class_order=CLASSES)

    half_gone = stream()
    learn(half_gone[:1], BARE, replace(ARGS, output_dir="pieces"), METHOD)
    data.rename(away)
    with pytest.raises(StreamError, match=r"split '(test|train)': reading the stream failed: .*parquet"):
        learn(half_gone, BARE, replace(ARGS, output_dir="pieces"), METHOD)
    assert len(ContinualModel.from_pretrained("pieces").config.tasks) == 1
    away.rename(data)
    learn(stream(), BARE, replace(ARGS, output_dir="pieces"), METHOD)
    learn(stream(), BARE, replace(ARGS, output_dir="whole"), METHOD)  # last, as it keeps the pictures in the cache
    assert outcome("pieces") == outcome("whole")


def test_a_clock_that_jumps_changes_nothing(stream, monkeypatch):
    learn(stream, BARE, replace(ARGS, output_dir="whole"), METHOD)
    right, hours = time.time, iter([7 * 24, -48])
    for count in (1, 3):
        ahead = 3600 * next(hours)
        monkeypatch.setattr(time, "time", lambda ahead=ahead: right() + ahead)
        learn(stream[:count], BARE, replace(ARGS, output_dir="pieces", save_steps=1), METHOD)
    assert outcome("pieces") == outcome("whole")
