"""The continual model: predictions that no neighbour can change, and a folder that is loaded whole or not at all."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_clpeft import BackboneError, ConfigError, ContinualModel, ExpertError
from hf_clpeft.streams.images import decode


@pytest.fixture
def saved(learnt, tmp_path):
    """A copy of the learnt model's folder, to be broken."""
    return shutil.copytree(learnt.args.output_dir, tmp_path / "model")


def pixels(model, count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


METHODS = ["s_lora", "s_lora_pp", "s_prompts", "s_prompts_pp", "l2l", "l2p"]


@pytest.mark.parametrize("learnt", METHODS, indirect=True)
def test_neither_batch_size_nor_order_across_tasks_changes_a_prediction(learnt):
    images = [decode(encoded) for task in learnt.stream for encoded, _, _ in task.test]
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


@pytest.mark.parametrize("learnt", METHODS, indirect=True)
def test_a_saved_model_predicts_the_same(learnt, saved):
    loaded = ContinualModel.from_pretrained(saved)
    with torch.no_grad():
        expected, found = learnt.model(pixels(loaded)), loaded(pixels(loaded))
    assert torch.equal(found.routing.selection, expected.routing.selection)
    torch.testing.assert_close(found.logits, expected.logits)
    assert loaded.config.classes == learnt.model.config.classes == ["0", "1", "2", "3", "4", "5"]


def test_saving_again_changes_no_byte(saved, tmp_path):
    ContinualModel.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (saved / path.relative_to(tmp_path / "again")).read_bytes(), path


def test_the_folder_holds_json_and_safetensors_and_the_reports(saved):
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    experts = {
        f"experts/task-00{i}/{n}" for i in range(3) for n in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert names == experts | {
        "README.md",
        "config.json",
        "preprocessor_config.json",
        "router.safetensors",
        "heads.safetensors",
        "metrics.json",
        "accuracy_matrix.csv",
        "accuracy_and_routing.png",
    }


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
    assert report.tasks == ["task-003"] and len(report.routing_confusion[0]) == 4
    with torch.no_grad():
        after = model(pixels(model))
    stay = after.routing.selection == before.routing.selection
    assert stay.any() and torch.equal(model.router.prototypes[: len(prototypes)], prototypes)
    # In batches of the same images, so that nothing but the model could make a difference.
    with torch.no_grad():
        again = ContinualModel.from_pretrained(saved).bank(pixels(model), before.routing.selection)
        assert torch.equal(model.bank(pixels(model), before.routing.selection), again)
        assert torch.equal(model.heads(again, before.routing.selection)[:, :6], before.logits)
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

    with pytest.raises(RuntimeError, match="learnt no task yet"):
        ContinualModel.from_backbone(BACKBONE, s_lora()).predict([])


def test_another_backbone_is_refused(saved, fresh_backbone):
    fresh_backbone.config.weight_hash = "0" * 64
    with pytest.raises(BackboneError, match="000000000000…, but .* was trained on"):
        ContinualModel.from_pretrained(saved, backbone=fresh_backbone)


@pytest.mark.parametrize("file", ["router.safetensors", "heads.safetensors"])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(ConfigError, match=file):
        ContinualModel.from_pretrained(saved)


def test_a_missing_expert_is_named(saved):
    shutil.rmtree(saved / "experts" / "task-001")
    with pytest.raises(ExpertError, match="'task-001' lacks the file"):
        ContinualModel.from_pretrained(saved)


def test_a_router_without_prototypes_of_a_task_is_refused(saved):
    tensors = load_file(saved / "router.safetensors")
    keep = tensors["owners"] != 1
    save_file({key: tensor[keep].clone() for key, tensor in tensors.items()}, saved / "router.safetensors")
    with pytest.raises(ConfigError, match="for tasks \\[0, 2\\]"):
        ContinualModel.from_pretrained(saved)


def test_a_head_of_another_width_is_refused(saved):
    tensors = load_file(saved / "heads.safetensors")
    tensors["task-001.weight"] = tensors["task-001.weight"][:, :-1].clone()
    save_file(tensors, saved / "heads.safetensors")
    with pytest.raises(ConfigError, match="head of task 'task-001' does not fit"):
        ContinualModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config.update(format_version=99), "format_version 99"),
        (lambda config: config.update(surprise=1), "unknown"),
        (lambda config: config["tasks"][0].update(name="../../etc"), "must be 1 to 96 letters"),
        (lambda config: config["method"].update(k=0), "k=0"),
        (lambda config: config.pop("classes") and config.pop("method"), "lacks a field"),
    ],
)
def test_a_broken_configuration_is_refused(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        ContinualModel.from_pretrained(saved)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no hf_clpeft model"):
        ContinualModel.from_pretrained(tmp_path)
