"""APER: what the frozen backbone sees and what the first task's expert sees, in one cosine to class means."""

import pytest
import torch
from conftest import make_trainer, outcome, pattern_dataset
from safetensors.torch import load_file
from torch.nn.functional import normalize

from hf_clpeft import METHODS, ConfigError, ContinualModel, TaskStream, aper, load_benchmark, s_lora
from hf_clpeft.streams.images import open_image


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6, per_class=8), num_tasks=3)


@pytest.fixture(scope="module")
def folder(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aper")
    make_trainer(aper(), folder, learning_rate=1e-2).learn_stream(stream)
    return folder


@torch.no_grad()
def features_of(model, task, side):
    """Frozen features and those with the expert, side by side; and class indices."""
    rows = list(getattr(task, side))
    resized = model.backbone.transform.resize([open_image(encoded) for encoded, _, _ in rows])
    pixels = model.backbone.transform.normalize(torch.from_numpy(resized))
    adapted = model.bank(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    labels = torch.tensor([model.config.classes.index(task.classes[label]) for _, label, _ in rows])
    return torch.cat([model.bank.frozen(pixels), adapted], dim=1), labels, pixels


def test_logits_are_cosines_to_class_means_of_both_features(folder, stream):
    model, means = ContinualModel.from_pretrained(folder), []
    assert model.bank.names == ["all-tasks"]
    for task in stream:
        features, labels, _ = features_of(model, task, "train")
        for label in task.classes:
            own = features[labels == model.config.classes.index(label)]
            means.append(normalize(sum(normalize(row, dim=0) for row in own), dim=0))
    for task in stream:
        features, _, pixels = features_of(model, task, "test")
        frozen, adapted = features.split(128, dim=1)
        assert not torch.allclose(frozen, adapted, atol=1e-2)
        with torch.no_grad():
            torch.testing.assert_close(model(pixels).logits, normalize(features, dim=1) @ torch.stack(means).T)


def test_class_means_are_as_wide_as_both_features(folder):
    tensors = load_file(folder / "router.safetensors")
    assert tensors["prototypes"].shape == (6, 256)


def test_an_image_costs_two_passes(folder, stream):
    assert ContinualModel.from_pretrained(folder).report.test_forwards_per_image == 2


def test_layers_of_both_can_be_chosen(stream):
    trainer = make_trainer(aper(query_layers=[-2, -1]), learning_rate=1e-2)
    assert trainer.learn_stream(stream[:2]).summary()["average_accuracy"] > 0.5
    assert trainer.model.router.prototypes.shape == (4, 512)


def test_the_expert_of_an_s_lora_model_is_taken_for_the_first_task_alone(folder, stream, tmp_path):
    make_trainer(s_lora(k=1), tmp_path / "s_lora", learning_rate=1e-2).learn_stream(stream)
    given = make_trainer(aper(), tmp_path / "given", experts_from=str(tmp_path / "s_lora"))
    given.learn_stream(stream)
    assert outcome(tmp_path / "given")[0] == outcome(folder)[0]
    with pytest.raises(ConfigError, match="was made with peft="):
        make_trainer(aper(r=2), "other", experts_from=str(tmp_path / "s_lora"))


def test_it_remembers_digits_in_classes_and_in_domains():
    options = {"max_train_samples_per_task": 48, "max_test_samples_per_task": 32}
    for benchmark in ("digits", "digits_domains"):
        trainer = make_trainer(aper(), benchmark, num_train_epochs=3, learning_rate=1e-2)
        report = trainer.learn_stream(load_benchmark(benchmark, **options))
        assert report.summary()["average_accuracy"] > 0.7  # sequential_lora on classes: 0.2


def test_without_the_frozen_features_it_is_a_closed_form_on_those_of_the_first_expert(folder, stream):
    peft = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    options = METHODS["closed_form_first"].Config(peft=peft, router="class_means")
    other = make_trainer(options, "first", learning_rate=1e-2)
    other.learn_stream(stream[:1])
    expert, same = ContinualModel.from_pretrained(folder).bank[0], other.model.bank[0]
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in expert.tensors.items())
