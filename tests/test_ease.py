"""EASE: the experts of all tasks read every image, and what they would have said of old classes is inferred."""

import math

import pytest
import torch
from conftest import BACKBONE, make_trainer, outcome, pattern_dataset, vouch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

from hf_clpeft import ConfigError, ContinualModel, TaskStream, combine, ease, load_benchmark, s_lora
from hf_clpeft.demo.teaching import refusal
from hf_clpeft.methods.ease import complete
from hf_clpeft.streams.images import open_image


pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6, per_class=8), num_tasks=3)


@pytest.fixture(scope="module")
def domains():
    patterns = pattern_dataset(3, domains=["plain", "negative"])
    return TaskStream.domain_incremental(patterns, domains=["plain", "negative"])


@pytest.fixture(scope="module")
def giver(stream, tmp_path_factory):
    """An S-LoRA model of the same tasks."""
    folder = tmp_path_factory.mktemp("s_lora")
    make_trainer(s_lora(k=1), folder, learning_rate=1e-2).learn_stream(stream)
    return folder


@pytest.fixture(scope="module")
def folder(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ease")
    make_trainer(ease(), folder, learning_rate=1e-2).learn_stream(stream)
    return folder


def pixels_of(model, task, side="train"):
    rows = list(getattr(task, side))
    resized = model.backbone.transform.resize([open_image(encoded) for encoded, _, _ in rows])
    numbers = [model.config.classes.index(task.classes[label]) for _, label, _ in rows]
    return model.backbone.transform.normalize(torch.from_numpy(resized)), torch.tensor(numbers)


@torch.no_grad()
def under(model, pixels, expert):
    return model.bank(pixels, torch.full((len(pixels),), expert))


def naive_completion(means, owners):
    means = means.double()
    inferred = means.clone()
    for entry, own in enumerate(owners):
        for later in range(own + 1, means.shape[1]):
            others = [i for i, owner in enumerate(owners) if owner >= later]
            weights = [math.exp(cosine_similarity(means[entry, own], means[i, own], dim=0)) for i in others]
            inferred[entry, later] = sum(
                weight / sum(weights) * means[i, later] for weight, i in zip(weights, others, strict=True)
            )
    return inferred


def naive_logits(model, pixels, alpha=0.1):
    """One image, one class, one expert at a time."""
    tasks, experts = model.config.tasks, range(len(model.bank))
    read = [under(model, pixels, expert) for expert in experts]
    logits = torch.full((len(pixels), len(model.config.classes)), -torch.inf)
    entry = 0
    for position, task in enumerate(tasks):
        for label in task.classes:
            number = model.config.classes.index(label)
            for image in range(len(pixels)):
                cosines = [cosine_similarity(read[e][image], model.method.means[entry, e], dim=0) for e in experts]
                others = [cosine for e, cosine in enumerate(cosines) if e != position]
                score = cosines[position] + alpha * sum(others) / max(1, len(others))
                logits[image, number] = max(logits[image, number], score)
            entry += 1
    return logits


def test_means_of_old_classes_are_averages_of_new_ones_by_their_similarity():
    means = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))
    owners = [0, 0, 1, 2, 2, 2, 3]
    inferred = complete(means, torch.tensor(owners))
    torch.testing.assert_close(inferred, naive_completion(means, owners).float())
    for entry, owner in enumerate(owners):
        assert torch.equal(inferred[entry, : owner + 1], means[entry, : owner + 1])
    assert torch.equal(complete(inferred, torch.tensor(owners)), inferred)


@pytest.mark.parametrize("kind", ["stream", "domains"])
def test_means_and_logits_are_those_of_the_formula(kind, stream, domains):
    tasks = stream if kind == "stream" else domains
    trainer = make_trainer(ease(), learning_rate=1e-2)
    trainer.learn_stream(tasks)
    model, entry = trainer.model, 0
    for position, task in enumerate(tasks):
        pixels, numbers = pixels_of(model, task)
        for label in task.classes:
            own = pixels[numbers == model.config.classes.index(label)]
            for expert in range(position + 1):
                torch.testing.assert_close(model.method.means[entry, expert], under(model, own, expert).mean(dim=0))
            entry += 1
    assert model.method.means.shape == (entry, len(tasks), model.backbone.hidden_size)
    pixels, _ = pixels_of(model, tasks[0], "test")
    with torch.no_grad():
        logits = model(pixels).logits
    torch.testing.assert_close(logits, naive_logits(model, pixels))


def test_a_chosen_expert_judges_among_the_classes_of_its_task(folder, stream):
    model = ContinualModel.from_pretrained(folder)
    pixels, numbers = pixels_of(model, stream[2], "test")
    with torch.no_grad():
        logits = model(pixels, expert=1).logits
    assert logits.isfinite().tolist() == [[False, False, True, True, False, False]] * len(pixels)
    expected = cosine_similarity(under(model, pixels, 1)[:, None], model.method.means[2:4, 1], dim=-1)
    torch.testing.assert_close(logits[:, 2:4], expected)


def test_what_is_saved_comes_back_and_what_does_not_fit_is_refused(folder, stream, tmp_path, backbone):
    model = ContinualModel.from_pretrained(folder, backbone=backbone)
    tensors = load_file(folder / "method.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"means": (6, 3, 128)}
    assert torch.equal(model.method.means, tensors["means"])
    model.save_pretrained(tmp_path / "copy")
    for means in (tensors["means"][:5], tensors["means"][:, :2]):
        save_file({"means": means.contiguous()}, tmp_path / "copy" / "method.safetensors")
        vouch(tmp_path / "copy")
        with pytest.raises(ConfigError, match="class means with"):
            ContinualModel.from_pretrained(tmp_path / "copy", backbone=backbone)


def test_experts_of_an_s_lora_model_are_taken_and_give_the_same(giver, folder, stream, tmp_path):
    trainer = make_trainer(ease(), tmp_path, learning_rate=1e-2, experts_from=str(giver))
    report = trainer.learn_stream(stream)
    assert outcome(tmp_path)[0] == outcome(folder)[0]
    assert report.test_forwards_per_image == 3  # once with each expert, in all evaluations together
    assert not report.routing_confusion and len(report.oracle_accuracy) == 3
    assert report.head_parameters == [0, 0, 0]
    assert report.expert_parameters[0] == 512 * trainer.model.backbone.num_layers
    with pytest.raises(ConfigError, match="was made with peft="):
        make_trainer(ease(r=2), "other", experts_from=str(giver))


def test_an_unlearnt_task_leaves_what_had_been_without_it(giver, folder, stream, tmp_path):
    model = ContinualModel.from_pretrained(folder)
    model.remove("task-001")
    never = make_trainer(ease(), tmp_path, experts_from=str(giver))
    never.learn_stream(TaskStream([stream[0], stream[2]]))
    assert torch.equal(model.method.means, never.model.method.means)
    pixels, _ = pixels_of(model, stream[2], "test")
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, never.model(pixels).logits)
    model.save_pretrained(tmp_path / "removed")
    model.remove("task-000")
    model.remove("task-002")
    assert model.method.means.shape == (0, 0, 128)


def test_tasks_of_one_class_are_told_apart():
    stream = TaskStream.class_incremental(pattern_dataset(3), num_tasks=3)
    assert make_trainer(ease()).learn_stream(stream).summary()["average_accuracy"] > 0.9


def test_a_class_without_images_is_refused():
    model = ContinualModel.from_backbone(BACKBONE, ease())
    model.start_task("pets", ["cat", "dog"])
    with pytest.raises(ConfigError, match="Each class of pets needs a training image"):
        model.finish_task(lambda features: (features(torch.zeros(2, 3, 32, 32)), torch.zeros(2)), num_train_images=2)


@pytest.mark.usefixtures("deep")
def test_it_remembers_digits():
    stream = load_benchmark("digits", max_train_samples_per_task=48, max_test_samples_per_task=24)
    trainer = make_trainer(ease(), num_train_epochs=3, learning_rate=1e-2, train_batch_size=16)
    assert trainer.learn_stream(stream).summary()["average_accuracy"] > 0.7  # sequential_lora: 0.2


def test_what_it_cannot_do_it_says(folder):
    model = ContinualModel.from_pretrained(folder)
    with pytest.raises(ConfigError, match="has class means with its own experts alone"):
        combine([model, model])
    assert "all tasks read every picture in ease" in refusal(model)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="alpha="):
            ease(alpha=alpha)
