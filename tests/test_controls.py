"""Controls and the mixed method are models like any other; and experts that are taken over, not trained again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BACKBONE, OnStep, make_trainer, outcome, pattern_dataset
from hub_server import check_card

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    ExpertError,
    TaskStream,
    linear_probe,
    ncm,
    ranpac,
    ranpac_first,
    s_lora,
    s_lora_mix,
    s_lora_pp,
    sequential_lora,
    slda,
)
from hf_clpeft.export import export_merged
from hf_clpeft.reports.card import make_card
from hf_clpeft.streams.images import open_image


STREAM = {"num_tasks": 3}
JOINT = [linear_probe(), sequential_lora()]  # ceilings on the images of all tasks at once


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(num_classes=6, per_class=12), **STREAM)


@pytest.fixture(scope="module")
def domains():
    patterns = pattern_dataset(domains=["plain", "negative"])
    return TaskStream.domain_incremental(patterns, domains=["plain", "negative"])


def accuracy_of(model, stream):
    """Mean over tasks of the share of test images that get their label from `predict`."""
    shares = []
    for task in stream:
        rows = list(task.test)
        found = model.predict([open_image(encoded) for encoded, _, _ in rows])
        shares.append(np.mean([p.label == task.classes[row[1]] for p, row in zip(found, rows, strict=True)]))
    return np.mean(shares)


@pytest.mark.parametrize("method", JOINT, ids=lambda method: method.name)
def test_a_ceiling_learns_saves_predicts_and_has_a_card(method, stream, domains, tmp_path):
    for kind, tasks in (("classes", stream.joined()), ("domains", domains.joined())):
        trainer = make_trainer(method, tmp_path / kind, num_train_epochs=4, learning_rate=1e-2)
        summary = trainer.learn_stream(tasks).summary()
        model = ContinualModel.from_pretrained(tmp_path / kind)
        assert summary["average_accuracy"] > 0.5
        assert accuracy_of(model, tasks) == pytest.approx(summary["average_accuracy"])
        card = str(make_card(model.config, model.report, f"alice/{method.name.replace('_', '-')}"))
        assert check_card(card) == ([], [])
        assert not any(np.isnan(value) for value in summary.values())
        assert all(count > 0 for count in model.report.stored_bytes[:1])


def test_what_classifies_without_experts_names_none(stream, tmp_path):
    trainer = make_trainer(slda(), tmp_path)
    trainer.learn_stream(stream)
    model, image = trainer.model, open_image(next(iter(stream[0].test))[0])
    (prediction,) = model.predict(image, top_k=3)
    assert prediction.expert is None and prediction.experts == {} and prediction.distance > 0
    with pytest.raises(ConfigError, match="no expert judges images in slda"):
        model.predict(image, expert="task-000")
    with pytest.raises(ExpertError, match="no expert that belongs to a task"):
        export_merged(model, "task-000", tmp_path / "merged")


def test_closed_forms_forget_nothing_whatever_the_order(stream):
    accuracies = []
    for folder, tasks in (("there", stream), ("back", TaskStream(list(stream)[::-1]))):
        report = make_trainer(slda(), folder, disable_tqdm=True).learn_stream(tasks)
        accuracies.append(report.summary()["average_accuracy"])
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("method", JOINT, ids=lambda method: method.name)
def test_what_trains_jointly_is_measured_once_with_the_images_of_all_tasks(method, stream, tmp_path):
    trainer = make_trainer(method, tmp_path, num_train_epochs=4, learning_rate=1e-2)
    report = trainer.learn_stream(stream.joined())
    assert [task.num_train_images for task in trainer.model.config.tasks] == [len(stream) * 24]
    assert trainer.model.config.classes == [label for task in stream for label in task.classes]
    assert np.array(report.accuracy_matrix).shape == (1, 1)
    assert report.summary()["average_accuracy"] == report.accuracy_matrix[0][0] > 0.5


def test_a_joint_run_that_was_killed_still_sees_the_images_of_all_tasks(stream, tmp_path):
    options = {"save_steps": 2, "resume_from_checkpoint": "auto"}

    def die(step, steps):
        if step == 5:
            raise RuntimeError("killed")

    killed = make_trainer(sequential_lora(), tmp_path / "killed", callbacks=[OnStep(die)], **options)
    with pytest.raises(RuntimeError, match="killed"):
        killed.learn_stream(stream.joined())
    make_trainer(sequential_lora(), tmp_path / "killed", **options).learn_stream(stream.joined())
    make_trainer(sequential_lora(), tmp_path / "whole", **options).learn_stream(stream.joined())
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_the_mixed_method_judges_by_the_likeliest_experts_in_one_pass(stream, tmp_path):
    trainer = make_trainer(s_lora_mix(mix=2), tmp_path)
    trainer.learn_stream(stream)
    model, passes = trainer.model, []
    assert model.method.query_layers == [5, 6] and model.config.method.query_layers == [-2, -1]
    model.backbone.model.layers[0].register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    pixel_values = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(pixel_values)
        forced = model(pixel_values, expert=1)
    assert passes[:2] == [4, 8] and output.selection.shape == (4, 2) and output.logits.shape == (4, 6)
    assert torch.equal(output.selection, output.distances.topk(2, largest=False).indices)
    assert (forced.selection == 1).all() and forced.logits.isfinite().sum(dim=1).tolist() == [2] * 4


def test_experts_that_are_taken_over_are_those_that_training_would_have_given(stream, tmp_path):
    make_trainer(s_lora(k=2), tmp_path / "giver").learn_stream(stream)
    reports, models = [], []
    for name, options in (("trained", {}), ("taken", {"experts_from": str(tmp_path / "giver")})):
        trainer = make_trainer(s_lora_pp(k=2), tmp_path / name, **options)
        reports.append(trainer.learn_stream(stream))
        models.append(trainer.model)
    assert reports[0].accuracy_matrix == reports[1].accuracy_matrix
    assert reports[0].stored_bytes == reports[1].stored_bytes and reports[1].seconds[0]["train"] > 0
    for one, other in zip(*(model.bank for model in models), strict=True):
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    assert models[0].config.files["heads.safetensors"] == models[1].config.files["heads.safetensors"]
    first = make_trainer(ranpac_first(projection_size=50), tmp_path / "first", experts_from=str(tmp_path / "giver"))
    seconds = first.learn_stream(stream[:2]).seconds
    assert seconds[0]["train"] == reports[1].seconds[0]["train"] and "train" not in seconds[1]
    assert torch.equal(first.model.bank[0].tensors[key := next(iter(one.tensors))], models[0].bank[0].tensors[key])


def test_experts_that_do_not_fit_are_not_taken_over(stream, tmp_path):
    make_trainer(s_lora(k=2), tmp_path).learn(stream[0])
    where = {"experts_from": str(tmp_path)}
    with pytest.raises(ConfigError, match="was made with peft="):
        make_trainer(s_lora(r=2), "out", **where)
    with pytest.raises(ConfigError, match="ncm cannot take experts of s_lora"):
        make_trainer(ncm(), "out", **where)
    others = TaskStream.class_incremental(pattern_dataset(num_classes=4), num_tasks=1)
    with pytest.raises(ConfigError, match="has learnt task-000 with the classes"):
        make_trainer(s_lora(), "out", **where).learn(others[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ContinualModel.from_backbone(BACKBONE, s_lora(router="nearest")), "There is no router 'nearest'"),
        (lambda: s_lora_mix(mix=0), "mix=0 must be 1 or more"),
        (lambda: s_lora(query_layers=[3, 2]), r"query_layers=\[3, 2\] must be layers"),
        (
            lambda: ContinualModel.from_backbone(BACKBONE, s_lora_mix(router="prototypes")),
            "'prototypes' are none",
        ),
        (
            lambda: ContinualModel.from_backbone(BACKBONE, METHODS["closed_form"].Config(router="prototypes")),
            "'prototypes' knows tasks alone",
        ),
        (lambda: replace(ranpac(), projection_size=0), "projection_size=0 must be between 1 and 100,000"),
    ],
)
def test_methods_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_layers_that_the_backbone_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"query_layers=\[6, 7\], but the backbone has 6 layers"):
        ContinualModel.from_backbone(BACKBONE, s_lora(query_layers=[6, 7]))
