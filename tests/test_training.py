"""The loop over tasks: what is learnt, what it costs, what is left on disk."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_trainer, pattern_dataset

from hf_clpeft import ConfigError, ContinualModel, TaskStream, load_benchmark, s_lora, s_prompts, sequential_lora


REPO = Path(__file__).parents[1]


def test_tasks_are_learnt_and_kept(learnt):
    report = learnt.report
    matrix = np.array(report.accuracy_matrix)
    assert matrix.shape == (3, 3) and np.isnan(matrix[np.triu_indices(3, 1)]).all()
    assert report.summary()["average_accuracy"] > 0.75
    assert report.summary()["routing_accuracy"] > 0.75
    assert report.summary()["oracle_accuracy"] > 0.85
    assert [sum(row) for row in report.routing_confusion] == [24, 24, 24]


def test_what_is_on_disk_says_what_was_measured(learnt):
    folder = Path(learnt.args.output_dir)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["summary"] == learnt.report.summary()
    assert metrics["accuracy_matrix"][0] == [learnt.report.accuracy_matrix[0][0], None, None]
    assert metrics["environment"]["backbone"]["weight_hash"] == learnt.model.config.backbone.weight_hash
    rows = list(csv.reader((folder / "accuracy_matrix.csv").open()))
    assert rows[0] == ["after", "task-000", "task-001", "task-002"]
    assert float(rows[3][2]) == pytest.approx(learnt.report.accuracy_matrix[2][1], abs=1e-6)
    assert (folder / "accuracy_and_routing.png").read_bytes()[:4] == b"\x89PNG"


def test_costs_are_counted_from_what_was_trained(learnt):
    expert = learnt.model.bank.experts[0]
    assert learnt.report.expert_parameters == [expert.num_parameters] * 3
    assert learnt.report.head_parameters == [2 * (learnt.model.backbone.hidden_size + 1)] * 3
    files = sum(t.nbytes for t in expert.tensors.values()) + 4 * learnt.report.head_parameters[0] + 10 * 128 * 4
    assert learnt.report.stored_bytes == [files] * 3


def test_the_backbone_comes_out_as_it_went_in(learnt, backbone):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(learnt.model.query_features(images), backbone(images))


def test_the_same_seed_gives_the_same_model(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    runs = []
    for name in "ab":
        trainer = make_trainer(s_lora(k=2), tmp_path / name, augmentation="crop_flip", seed=3)
        trainer.learn_stream(stream)
        runs.append([expert.tensors for expert in trainer.model.bank])
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_one_adapter_in_sequence_forgets_what_s_lora_keeps(tmp_path):
    stream = load_benchmark("digits", max_train_samples_per_task=96, max_test_samples_per_task=24)[:3]
    options = {"train_batch_size": 32, "num_train_epochs": 4, "learning_rate": 1e-2}
    summary = make_trainer(sequential_lora(), tmp_path, **options).learn_stream(stream).summary()
    assert summary["forgetting"] > 0.5 and "routing_accuracy" not in summary
    model = ContinualModel.from_pretrained(tmp_path)
    assert [expert.name for expert in model.bank] == ["all-tasks"]
    assert len(model.predict([stream_image(stream)])) == 1


def stream_image(stream):
    from hf_clpeft.streams.images import decode

    return decode(next(iter(stream[0].test))[0])


def test_domains_get_a_head_each_and_forward_transfer_on_demand(tmp_path):
    stream = TaskStream.domain_incremental(
        pattern_dataset(domains=["plain", "negative"]), domains=["plain", "negative"]
    )
    trainer = make_trainer(s_prompts(prompt_length=2, k=4), tmp_path, forward_transfer=True)
    report = trainer.learn_stream(stream)
    assert trainer.model.config.method.head == "per_task" and not trainer.model.heads.shared
    assert not math.isnan(report.accuracy_matrix[0][1])
    assert report.summary()["forward_transfer"] == pytest.approx(report.accuracy_matrix[0][1] - 0.25)
    without = make_trainer(s_prompts(prompt_length=2, k=4), tmp_path / "without")
    without.learn_stream(stream)  # looking ahead must leave no trace in what is learnt
    for one, other in zip(trainer.model.bank, without.model.bank, strict=True):
        assert torch.equal(one.tensors["prompt_embeddings"], other.tensors["prompt_embeddings"])


def test_evaluating_after_each_of_twenty_tasks_takes_at_most_three_forwards_per_image(tmp_path, monkeypatch):
    stream = TaskStream.class_incremental(pattern_dataset(num_classes=40, per_class=4), num_tasks=20)
    trainer = make_trainer(s_lora(k=2), tmp_path, num_train_epochs=1)
    passed = {"frozen": 0, "forward": 0}  # images through the backbone outside of training
    for name in passed:
        original = getattr(trainer.model.bank, name)

        def counting(pixels, *args, name=name, original=original):
            passed[name] += len(pixels)
            return original(pixels, *args)

        monkeypatch.setattr(trainer.model.bank, name, counting)
    report = trainer.learn_stream(stream)
    assert len(report.accuracy_matrix) == 20
    num_train, num_test = (sum(len(list(getattr(task, side))) for task in stream) for side in ("train", "test"))
    assert report.test_forwards_per_image == (passed["frozen"] - num_train + passed["forward"]) / num_test
    assert report.test_forwards_per_image <= 3


def test_stored_features_give_the_accuracy_of_a_fresh_evaluation(learnt):
    fresh = ContinualModel.from_pretrained(learnt.args.output_dir)
    from hf_clpeft.streams.images import decode

    for j, task in enumerate(learnt.stream):
        predictions = fresh.predict([decode(encoded) for encoded, _, _ in task.test])
        wanted = [task.classes[label] for _, label, _ in task.test]
        accuracy = np.mean([p.label == label for p, label in zip(predictions, wanted, strict=True)])
        assert accuracy == pytest.approx(learnt.report.accuracy_matrix[-1][j])


def test_accumulated_batches_sgd_and_bf16_train_too(tmp_path, other_precision):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    options = {"optim": "sgd", "gradient_accumulation_steps": 3, "mixed_precision": "bf16", "train_batch_size": 4}
    report = make_trainer(s_lora(k=2), tmp_path, **options).learn_stream(stream)
    assert report.environment["mixed_precision"] == "bf16"


def test_a_tracker_gets_losses_and_metrics(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    make_trainer(s_lora(k=2), tmp_path, report_to="tensorboard", logging_steps=1).learn_stream(stream)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "hf_clpeft")).Reload()
    assert {"train/loss", "eval/average_accuracy"} <= set(events.Tags()["scalars"])


def test_more_prototypes_than_images_are_reduced_with_a_warning(tmp_path, caplog):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2, max_train_samples_per_task=4)
    trainer = make_trainer(s_lora(k=9), tmp_path)
    trainer.learn(stream[0])
    assert "fewer than k=9" in caplog.text and len(trainer.model.router.prototypes) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"warmup_ratio": 2.0}, "warmup_ratio=2.0"),
        ({"report_to": "abacus"}, "report_to='abacus'"),
        ({"report_to": "wandb"}, "pip install wandb"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(s_lora(), **options)


def test_two_processes_give_the_accuracy_matrix_of_one_and_see_every_image_once(tmp_path):
    matrices, prototypes = [], []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for count in (1, 2):
        out = tmp_path / str(count)
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
        ]
        command += ["--dynamo_backend", "no", "--num_processes", str(count)] + ["--multi_gpu"] * (count > 1)
        command += [str(REPO / "recipes" / "s_lora.py"), "--benchmark", "digits", "--num_train_epochs", "4"]
        command += ["--max_train_samples_per_task", "150", "--output_dir", str(out), "--disable_tqdm"]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("oracle") == 1  # one table, from the main process
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["environment"]["num_processes"] == count
        matrices.append(np.array(metrics["accuracy_matrix"], dtype=float))
        prototypes.append(ContinualModel.from_pretrained(out).router.prototypes)
    lower = np.tril_indices(5)
    assert abs(matrices[0][lower] - matrices[1][lower]).mean() <= 0.02
    # k-means on the same features in the same order gives the same centres: no image was lost or seen twice.
    torch.testing.assert_close(prototypes[0], prototypes[1], atol=1e-4, rtol=0)
