"""The continual model: predictions that no neighbour can change, and a folder that is loaded whole or not at all."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_trainer, pattern_dataset, pattern_rows, vouch
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_clpeft import (
    BackboneError,
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    HubError,
    TaskStream,
    load_benchmark,
    load_task,
    s_x,
)
from hf_clpeft.streams.images import open_image


pytestmark = pytest.mark.usefixtures("shallow")


def pixels(model, count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


def test_neither_batch_size_nor_order_across_tasks_changes_a_prediction(learnt):
    images = [open_image(encoded) for task in learnt.stream for encoded, _, _ in task.test]
    together = learnt.model.predict(images, batch_size=64)
    order = random.Random(0).sample(range(len(images)), len(images))
    shuffled = learnt.model.predict([images[i] for i in order], batch_size=64)
    alone = learnt.model.predict(images, batch_size=1)
    assert len({prediction.expert for prediction in together}) > 1
    for position, i in enumerate(order):
        for other in (shuffled[position], alone[i]):
            assert (other.label, other.expert) == (together[i].label, together[i].expert)
            assert other.score == pytest.approx(together[i].score, abs=1e-4)
            assert other.distance == pytest.approx(together[i].distance, abs=1e-5)


def test_a_new_task_leaves_old_logits_routes_and_tensors_bit_identical(saved, learnt):
    from hf_clpeft import ContinualTrainer, load_benchmark

    model = ContinualModel.from_pretrained(saved)
    with torch.no_grad():
        before = model(pixels(model))
    tensors = [{key: tensor.clone() for key, tensor in expert.tensors.items()} for expert in model.bank]
    prototypes = model.router.prototypes.clone()
    args = replace(learnt.args, output_dir="more", num_train_epochs=1)
    new = load_benchmark("digits", max_train_samples_per_task=32, max_test_samples_per_task=8)[3]
    report = ContinualTrainer(model, args).learn(new)
    assert report.tasks == [f"task-00{i}" for i in range(4)]
    assert report.routing_confusion[:3] == [[0] * 4] * 3 and sum(report.routing_confusion[3]) == 8  # old data are gone
    assert report.accuracy_matrix[2][:3] == learnt.report.accuracy_matrix[2]
    assert report.measured() == [3] and report.summary()["average_accuracy"] == report.accuracy_matrix[3][3]
    with torch.no_grad():
        after = model(pixels(model))
    stay = after.selection == before.selection
    assert stay.any() and torch.equal(model.router.prototypes[: len(prototypes)], prototypes)
    # In batches of the same images, so that nothing but the model could make a difference.
    with torch.no_grad():
        again = ContinualModel.from_pretrained(saved).bank(pixels(model), before.selection)
        assert torch.equal(model.bank(pixels(model), before.selection), again)
        assert torch.equal(model.heads(again, before.selection)[:, :6], before.logits)
    for old, expert in zip(tensors, model.bank, strict=False):
        assert all(torch.equal(old[key], expert.tensors[key]) for key in old)


def test_a_task_is_not_learnt_twice(learnt):
    with pytest.raises(ConfigError, match="'task-000' already"):
        learnt.model.start_task("task-000", ["a", "b"])


def test_a_task_name_that_is_no_folder_is_refused(learnt):
    with pytest.raises(ConfigError, match="must be 1 to 96 letters"):
        learnt.model.start_task("../elsewhere", ["a", "b"])


def test_a_model_that_has_learnt_nothing_says_so(backbone):
    from conftest import BACKBONE

    from hf_clpeft import s_lora

    with pytest.raises(ConfigError, match="learnt no task yet"):
        ContinualModel.from_backbone(BACKBONE, s_lora()).predict([])


def test_another_backbone_is_refused(saved, fresh_backbone):
    fresh_backbone.config.weight_hash = "0" * 64
    with pytest.raises(BackboneError, match="000000000000…, but .* was trained on"):
        ContinualModel.from_pretrained(saved, backbone=fresh_backbone)


def test_a_pipeline_of_transformers_gives_the_same_labels_and_scores(learnt):
    from transformers import pipeline

    images = [open_image(encoded) for task in learnt.stream for encoded, _, _ in task.test][::6]
    classify = pipeline("image-classification", model=learnt.model, image_processor=learnt.model.backbone.processor)
    for found, expected in zip(classify(images, batch_size=4), learnt.model.predict(images), strict=True):
        assert len(found) == 5 and found[0]["label"] == expected.label
        assert found[0]["score"] == pytest.approx(expected.score, abs=1e-4)


def test_a_single_class_is_learnt_by_its_route_and_changes_no_other_answer(learnt, saved):
    model = ContinualModel.from_pretrained(saved)
    rows = pattern_rows(num_classes=1, per_class=6)
    data = DatasetDict(train=Dataset.from_dict({"image": rows["image"][:5], "label": ["stripes"] * 5}))
    images = [open_image(encoded) for task in learnt.stream for encoded, _, _ in task.test]
    before = model.predict(images)
    ContinualTrainer(model, ContinualTrainingArguments("more", disable_tqdm=True)).learn(
        load_task(data, name="stripes", test_size=0)
    )
    assert model.predict(images) == before
    found = ContinualModel.from_pretrained("more").predict(rows["image"][5])[0]
    assert (found.label, found.expert) == ("stripes", "stripes")
    assert np.isnan(model.report.accuracy_matrix[-1]).all() and model.report.tasks[-1] == "stripes"
    assert model.predict(rows["image"][5], expert="task-000")[0].label in ("0", "1", "2", "3", "4", "5")


@pytest.mark.usefixtures("deep")
def test_digits_are_seldom_rejected_and_what_is_no_digit_nearly_always():
    model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    test = [open_image(encoded) for task in load_benchmark("digits") for encoded, _, _ in task.test]
    rejected = np.array([p.label is None for p in model.predict(test, reject_rate=0.05)])
    assert rejected.mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(test))
    rotated = [image.rotate(45).crop((6, 6, 26, 26)) for image in test[::4]]
    assert np.mean([p.label is None for p in model.predict(rotated, reject_rate=0.05)]) > 0.5


def test_a_model_that_was_saved_before_thresholds_loads_and_says_why_it_cannot_reject(learnt, saved):
    tensors = load_file(saved / "router.safetensors")
    del tensors["thresholds"]
    save_file(tensors, saved / "router.safetensors")
    vouch(saved)
    model, image = ContinualModel.from_pretrained(saved), Image.new("RGB", (32, 32))
    (found,), (expected,) = model.predict(image), learnt.model.predict(image)
    assert (found.label, found.distance, found.typicality) == (expected.label, expected.distance, None)
    with pytest.raises(ConfigError, match="'task-000', .* saved before"):
        model.predict(image, reject_rate=0.05)


def test_a_revision_of_a_bundled_model_is_the_hubs(hub):
    with pytest.raises(HubError, match="s-lora-digits"):
        ContinualModel.from_pretrained("hf-clpeft/s-lora-digits", revision="task-001")


def test_an_image_of_no_task_gets_no_label(saved):
    model = ContinualModel.from_pretrained(saved)
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for image in map(Image.fromarray, noise):
        (found,) = model.predict(image, reject_rate=0.05)
        assert found.label is None and found.typicality < 0.05
        assert model.predict(image)[0].label is not None


@pytest.mark.parametrize("learnt", ["s_lora", "l2p"], indirect=True)
def test_top_k_tells_the_likeliest_classes_and_the_nearest_experts(learnt):
    image = open_image(next(iter(learnt.stream[1].test))[0])
    (found,) = learnt.model.predict(image, top_k=3)
    assert list(found.classes)[0] == found.label and list(found.experts)[0] == found.expert
    for values, expected in ((found.classes, found.score), (found.experts, found.distance)):
        assert len(values) == 3 and next(iter(values.values())) == expected
    assert list(found.classes.values()) == sorted(found.classes.values(), reverse=True)
    assert list(found.experts.values()) == sorted(found.experts.values())


def test_predict_refuses_what_the_model_cannot_do(learnt):
    image = Image.new("RGB", (32, 32))
    for options, message in (
        ({"reject_rate": 0.0}, "between 0.01 and 1"),
        ({"expert": "task-009"}, "not one of task-000"),
    ):
        with pytest.raises(ConfigError, match=message):
            learnt.model.predict(image, **options)


@pytest.mark.parametrize("learnt", ["l2l"], indirect=True)
def test_a_pool_neither_rejects_nor_takes_orders_nor_learns_a_single_class(learnt):
    image = Image.new("RGB", (32, 32))
    for options, message in (
        ({"reject_rate": 0.05}, "a router that keeps tasks apart"),
        ({"expert": "pool-001"}, "by hand"),
    ):
        with pytest.raises(ConfigError, match=message):
            learnt.model.predict(image, **options)
    with pytest.raises(ConfigError, match="nothing would tell it from the others"):
        learnt.model.start_task("stripes", ["stripes"])


def test_removing_a_task_leaves_everything_else_bit_identical(saved):
    whole, model = ContinualModel.from_pretrained(saved), ContinualModel.from_pretrained(saved)
    model.remove("task-001")
    assert [expert.name for expert in model.bank] == ["task-000", "task-002"]
    assert model.config.classes == ["0", "1", "4", "5"] and model.config.removed == ["task-001"]
    kept = whole.router.owners != 1
    assert torch.equal(model.router.prototypes, whole.router.prototypes[kept])
    with torch.no_grad():
        before, after = whole(pixels(model)), model(pixels(model))
    stay = before.selection != 1
    assert torch.equal(after.logits[stay], before.logits[stay][:, [0, 1, 4, 5]])
    assert torch.equal(after.distances[stay], before.distances[stay][:, [0, 2]])
    assert torch.equal(model.router.thresholds, whole.router.thresholds[[0, 2]])
    assert model.report.summary() == {} and model.report.tasks == ["task-000", "task-002"]
    model.save_pretrained("without")
    again = ContinualModel.from_pretrained("without")
    with torch.no_grad():
        assert torch.equal(again(pixels(model)).logits, after.logits)
    wiped = whole.bank[1].tensors
    for file in Path("without").rglob("*.safetensors"):
        assert not any(torch.equal(mine, theirs) for mine in load_file(file).values() for theirs in wiped.values())


def test_a_model_goes_on_learning_after_a_task_was_removed(saved, learnt):
    from hf_clpeft import ContinualTrainer, load_benchmark

    model = ContinualModel.from_pretrained(saved)
    model.remove("task-000")
    new = load_benchmark("digits", max_train_samples_per_task=32, max_test_samples_per_task=8)[3]
    ContinualTrainer(model, replace(learnt.args, output_dir=str(saved), num_train_epochs=1)).learn(new)
    assert ContinualModel.from_pretrained(saved).config.classes == ["2", "3", "4", "5", "6", "7"]
    assert not (saved / "experts" / "task-000").exists()
    with pytest.raises(ConfigError, match="has unlearnt a task 'task-000'"):
        model.start_task("task-000", ["a", "b"])


@pytest.mark.parametrize("learnt", ["s_lora_pp", "l2l"], indirect=True)
def test_a_task_that_others_build_on_cannot_be_removed(saved):
    with pytest.raises(ConfigError, match="its expert takes everyone's query features|none can be removed exactly"):
        ContinualModel.from_pretrained(saved).remove("task-000")


def test_a_task_whose_classes_were_trained_again_in_one_head_cannot_be_removed(tmp_path):
    trainer = make_trainer(s_x({"peft_type": "LORA"}, k=1, head="shared"), num_train_epochs=1)
    for task in TaskStream.domain_incremental(pattern_dataset(2, domains=["plain", "negative"])):
        trainer.learn(task)
    with pytest.raises(ConfigError, match="Other tasks trained classes \\['class 0', 'class 1'\\] too"):
        trainer.model.remove("task-001")
    with pytest.raises(ConfigError, match="no task 'task-002' to remove; the model has learnt task-000, task-001"):
        trainer.model.remove("task-002")
