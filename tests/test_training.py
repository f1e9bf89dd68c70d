"""The loop over tasks: what is learnt, what it costs, what is left on disk."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONE, make_trainer, pattern_dataset

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    TaskStream,
    l2l,
    l2p,
    load_benchmark,
    s_lora,
    s_lora_pp,
    s_prompts,
    s_prompts_pp,
    s_x,
    sequential_lora,
)
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.routing.prototypes import fit_prototypes
from hf_clpeft.streams import cache_images
from hf_clpeft.streams.images import open_image


pytestmark = pytest.mark.usefixtures("shallow")
REPO = Path(__file__).parents[1]


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("name", ["s_lora", "s_prompts"])
def test_tasks_are_learnt_and_kept(name, _trainers):
    report = _trainers(name, bundled_folder(BACKBONE)).report
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
    expert = learnt.model.bank[0]
    assert learnt.report.expert_parameters == [expert.num_parameters] * 3
    assert learnt.report.head_parameters == [2 * (learnt.model.backbone.hidden_size + 1)] * 3
    router = 10 * (128 * 4 + 8) + 100 * 4  # prototypes with their owners, and thresholds
    files = sum(t.nbytes for t in expert.tensors.values()) + 4 * learnt.report.head_parameters[0] + router
    assert learnt.report.stored_bytes == [files] * 3


def test_the_backbone_comes_out_as_it_went_in(learnt, backbone):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(learnt.model.method.query(images), backbone(images))


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
    from hf_clpeft.streams.images import open_image

    return open_image(next(iter(stream[0].test))[0])


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
    from hf_clpeft.streams.images import open_image

    for j, task in enumerate(learnt.stream):
        predictions = fresh.predict([open_image(encoded) for encoded, _, _ in task.test])
        wanted = [task.classes[label] for _, label, _ in task.test]
        accuracy = np.mean([p.label == label for p, label in zip(predictions, wanted, strict=True)])
        assert accuracy == pytest.approx(learnt.report.accuracy_matrix[-1][j])


def test_accumulated_batches_sgd_and_bf16_train_too(tmp_path, other_precision):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    options = {"optim": "sgd", "gradient_accumulation_steps": 3, "mixed_precision": "bf16", "train_batch_size": 4}
    report = make_trainer(s_lora(k=2), tmp_path, **options).learn_stream(stream)
    assert report.environment["mixed_precision"] == "bf16"


@pytest.mark.parametrize("method", [s_lora_pp(k=2), s_prompts_pp(k=2)], ids=lambda method: method.name)
def test_plus_plus_takes_all_query_features_with_the_first_expert(method, tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    trainer = make_trainer(method, tmp_path)
    trainer.learn_stream(stream)
    model = trainer.model
    for position, task in enumerate(stream):
        images = cache_images(task.train, model.backbone.transform)
        pixel_values = model.backbone.transform.normalize(
            torch.stack([images[i]["pixels"] for i in range(len(images))])
        )
        with torch.no_grad():
            query = model.method.query(pixel_values)
            first = model.bank(pixel_values, torch.zeros(len(images), dtype=torch.int64))
        assert torch.equal(query, first) and not torch.allclose(query, model.bank.frozen(pixel_values), atol=1e-3)
        expected = fit_prototypes(query, k=2, seed=0)
        torch.testing.assert_close(
            model.router.prototypes[model.router.owners == position], expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("method", [l2l(pool_size=4, top_n=2), l2p(pool_size=4, top_n=2)], ids=lambda m: m.name)
def test_a_pool_learns_and_says_who_was_selected(method, tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    trainer = make_trainer(method, tmp_path)
    fresh = trainer.model.router.keys.clone()
    report = trainer.learn_stream(stream)
    assert report.experts == ["pool-000", "pool-001", "pool-002", "pool-003"]
    assert [sum(row) for row in report.routing_confusion] == [2 * len(list(task.test)) for task in stream]
    assert "routing_accuracy" not in report.summary() and report.summary()["average_accuracy"] > 0.25
    assert not torch.equal(trainer.model.router.keys, fresh)
    assert not any(parameter.requires_grad for parameter in trainer.model.parameters())


def test_cached_query_features_change_nothing_but_the_time(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    pools = []
    for cache in (True, False):
        trainer = make_trainer(l2l(), tmp_path / str(cache), cache_query_features=cache)
        trainer.learn_stream(stream)
        pools.append(trainer.model.bank.table.rows)
    torch.testing.assert_close(*pools, atol=1e-4, rtol=0)


def test_masked_rows_of_a_shared_head_stay_bit_identical_while_a_pool_learns_on(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    trainer = make_trainer(l2l(), tmp_path)
    trainer.learn(stream[0])
    before = trainer.model.heads.weights[0].clone()
    trainer.learn(stream[1])
    assert torch.equal(trainer.model.heads.weights[0], before)


@pytest.mark.usefixtures("deep")
def test_routing_behind_a_layer_runs_only_the_layers_up_to_it(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    trainer = make_trainer(s_lora(k=2, query_layers=[2]), tmp_path)
    report = trainer.learn_stream(stream)
    layers_run = []
    for layer in trainer.model.backbone.model.layers:
        layer.register_forward_hook(lambda module, *_: layers_run.append(module))
    trainer.model.predict([open_image(encoded) for encoded, _, _ in stream[0].test])
    assert len(layers_run) == 2 + 6
    assert report.test_forwards_per_image < 2 and report.summary()["routing_accuracy"] > 0.5
    assert ContinualModel.from_pretrained(tmp_path).config.method.query_layers == [2]


@pytest.mark.usefixtures("deep")
def test_a_layer_that_the_backbone_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"query_layers=\[7\], but the backbone has 6 layers"):
        make_trainer(s_lora(query_layers=[7]))


def test_auto_chooses_prototypes_for_each_task(tmp_path):
    trainer = make_trainer(s_lora(k="auto"), tmp_path)
    trainer.learn_stream(TaskStream.class_incremental(pattern_dataset(per_class=20), num_tasks=2))
    assert len(trainer.model.router.prototypes) >= 4
    assert ContinualModel.from_pretrained(tmp_path).config.method.k == "auto"


def test_a_technique_without_a_fused_form_is_learnt_too(tmp_path):
    method = s_x(peft={"peft_type": "IA3", "feedforward_modules": []}, k=2)
    trainer = make_trainer(method, tmp_path, learning_rate=1e-1)
    report = trainer.learn_stream(TaskStream.class_incremental(pattern_dataset(), num_tasks=2))
    loaded = ContinualModel.from_pretrained(tmp_path)
    pixel_values = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, trainer.model(pixel_values).logits)
    assert report.summary()["oracle_accuracy"] > 0.5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: s_lora(k="many"), "k='many'"),
        (lambda: s_lora(query_layers=[0]), r"query_layers=\[0\]"),
        (lambda: l2l(pool_size=3, top_n=4), "top_n=4 must be between 1 and pool_size=3"),
        (lambda: l2l(pull=-1.0), "pull=-1.0"),
        (lambda: s_x(peft={"peft_type": "LORA", "r": object()}), "cannot be saved"),
        (lambda: l2l(lora={"lora_dropout": 0.1}), "lora_dropout cannot be in one"),
        (lambda: l2l(lora={"use_dora": True}), "use_dora cannot be in one"),
        (lambda: METHODS["l2x"].Config(peft={"peft_type": "IA3"}), "IA3 cannot be in one"),
        (lambda: METHODS["l2x"].Config(peft={"peft_type": "LORA"}, readout="prompts"), "a pool of prompts"),
        (lambda: s_x(peft={"peft_type": "LORA"}, head="some"), "head='some' must be one of"),
    ],
)
def test_methods_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


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
