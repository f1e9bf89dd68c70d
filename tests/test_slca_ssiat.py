"""SLCA and SSIAT: one adapter for all tasks, and a head that class Gaussians keep fair to old classes."""

import pytest
import torch
from conftest import make_trainer, pattern_dataset
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize

from hf_clpeft import Batch, ConfigError, ContinualModel, TaskStream, load_benchmark, load_task, slca, ssiat
from hf_clpeft.methods.alignment import AlignedHeads
from hf_clpeft.methods.cosine import CosineHead
from hf_clpeft.methods.ssiat import RIDGE, mean_drift, ridge_drift


pytestmark = pytest.mark.usefixtures("shallow")
WIDTH, BACKBONE = 128, "hf-clpeft/vit-tiny-glyphs"
METHODS = {"slca": slca(r=2), "ssiat": ssiat(r=2), "ridge": ssiat(r=2, drift="ridge")}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=4, seed=0):
    return torch.randn(count, 3, 32, 32, generator=generator(seed))


@pytest.fixture(scope="module")
def stream():
    """Class 1 comes back in the second task, and the last task has a single class."""
    data, tasks = pattern_dataset(5, per_class=8), []
    for name, numbers in (("first", [0, 1]), ("again", [1, 2, 3]), ("single", [4])):
        own = data.filter(lambda label, numbers=numbers: label in numbers, input_columns="label")
        tasks.append(load_task(own, name))
    return TaskStream(tasks)


def started(options, tasks=0, classes=2):
    """A model in the middle of a task, after so many of random images."""
    torch.manual_seed(0)
    model = ContinualModel.from_backbone(BACKBONE, options)
    for number in range(tasks + 1):
        names = [f"class {i}" for i in range(classes * number, classes * (number + 1))]
        model.start_task(f"task-{number:03d}", names)
        if number < tasks:
            finish(model, number, classes)
    return model


def finish(model, seed, classes=2):
    numbers = torch.tensor(model.method.numbers)
    pixels, labels = images(8 * classes, seed), numbers.repeat(8)
    with torch.no_grad():
        model.finish_task(lambda features: (features(pixels).float(), labels), num_train_images=len(pixels))
    return pixels, labels


def test_the_adapter_learns_slowly_from_the_second_task_on():
    args = make_trainer(slca(), learning_rate=0.1, head_learning_rate=0.3).args
    for tasks, rate in ((0, 0.1), (1, 0.01)):
        adapter, head = started(slca(slow=0.1), tasks).method.parameter_groups(args)
        assert adapter["lr"] == pytest.approx(rate) and head["lr"] == 0.3
        assert [parameter.shape[0] for parameter in head["params"]] == [2, 2]  # rows of the current classes alone


def test_the_loss_of_slca_is_over_the_classes_of_the_task():
    method = started(slca(), tasks=1).method
    torch.nn.init.normal_(method._head.weight)
    batch = Batch(images(), torch.tensor([2, 3, 3, 2]))
    features = method.bank.under_training(batch.pixels)
    expected = cross_entropy(features @ method._head.weight.T, torch.tensor([0, 1, 1, 0]), reduction="none")
    torch.testing.assert_close(method.loss(batch), expected)


def test_the_loss_of_ssiat_is_a_scaled_cosine_with_a_margin():
    method = started(ssiat(scale=10.0, margin=0.2), tasks=1).method
    batch = Batch(images(), torch.tensor([2, 3, 3, 2]))
    features, losses = method.bank.under_training(batch.pixels), []
    for feature, row in zip(features, (0, 1, 1, 0), strict=True):
        cosines = [torch.cosine_similarity(feature, weight, dim=0) for weight in method._head.weight]
        logits = [10 * (cosine - 0.2 * (number == row)) for number, cosine in enumerate(cosines)]
        losses.append(-(logits[row] - torch.stack(logits).logsumexp(dim=0)))
    torch.testing.assert_close(method.loss(batch), torch.stack(losses))
    logits = CosineHead(method._head.weight, scale=10.0)(features)
    assert logits.abs().max() <= 10


def test_a_mean_moves_by_the_drift_of_the_images_near_it():
    before, labels = torch.randn(12, 3, generator=generator()), torch.arange(12) % 3
    after, means = before + torch.randn(12, 3, generator=generator(1)), torch.randn(4, 3, generator=generator(2))
    own = [before[labels == label].mean(dim=0) for label in labels]
    spread = sum((one - mean).square().sum() for one, mean in zip(before, own, strict=True)) / 12
    expected = []
    for mean in means:
        weights = [torch.exp(-(one - mean).square().sum() / spread) for one in before]
        moves = [weight * (new - old) for weight, new, old in zip(weights, after, before, strict=True)]
        expected.append(sum(moves) / sum(weights))
    torch.testing.assert_close(mean_drift(means, before, after, labels), torch.stack(expected))
    # Neither the scale of features nor a distance at which every weight underflows changes anything.
    torch.testing.assert_close(
        mean_drift(1e3 * means, 1e3 * before, 1e3 * after, labels), 1e3 * torch.stack(expected), atol=1e-2, rtol=1e-3
    )
    assert mean_drift(means + 1e4, before, after, labels).isfinite().all()
    assert mean_drift(means, before[:1], after[:1], labels[:1]).isfinite().all()  # no spread at all


def test_a_linear_drift_is_found_and_what_no_image_shows_stays():
    matrix = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator())
    before = torch.randn(300, 6, generator=generator(1))
    torch.testing.assert_close(ridge_drift(before, before @ matrix), matrix, atol=1e-3, rtol=1e-3)
    flat = before[:9] * torch.tensor([1.0, 1, 1, 1, 0, 0])
    found = ridge_drift(flat, flat @ matrix)
    assert torch.equal(found[4:], torch.eye(6)[4:])
    inputs = flat / flat.norm(dim=1, keepdim=True)
    slope = torch.linalg.inv(inputs.T @ inputs + RIDGE * torch.eye(6)) @ inputs.T @ (inputs @ matrix - inputs)
    torch.testing.assert_close(found, torch.eye(6) + (1 - torch.tensor(-9 / 6).exp()) * slope, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("drift", ["mean", "ridge", "none"])
def test_old_gaussians_follow_the_images_of_the_task(drift):
    model = started(ssiat(drift=drift, r=2), tasks=1)
    method = model.method
    for parameter in method.bank.slot.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator())  # as if trained
    means, covariances = method.gaussians.means, method.gaussians.covariances
    with torch.no_grad():
        before = method.features(images(16, 1))
        pixels, labels = finish(model, seed=1)
        after = method.features(pixels)
    assert not torch.allclose(before, after)
    if drift == "mean":
        means = means + mean_drift(means, before, after, labels)
    elif drift == "ridge":
        matrix = ridge_drift(before, after)
        means, covariances = means @ matrix, matrix.T @ covariances @ matrix
    torch.testing.assert_close(method.gaussians.means[:2], means, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(method.gaussians.covariances[:2], covariances, atol=1e-3, rtol=1e-3)
    own = torch.stack([after[labels == number].mean(dim=0) for number in (2, 3)])
    torch.testing.assert_close(method.gaussians.means[2:], own, atol=1e-4, rtol=1e-4)


def test_predictions_of_ssiat_are_cosines_to_rows_of_norm_one():
    model = started(ssiat(scale=7.0), tasks=1)
    finish(model, seed=1)
    rows = model.heads.weights[-1]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    with torch.no_grad():
        logits, features = model(images()).logits, model.method.features(images())
    torch.testing.assert_close(logits, 7 * normalize(features, dim=1) @ rows.T)


@pytest.mark.parametrize("name", METHODS)
def test_classes_that_come_back_and_tasks_of_one_class_are_learnt_and_saved(name, stream, tmp_path):
    trainer = make_trainer(METHODS[name], tmp_path, num_train_epochs=6, learning_rate=5e-3)
    report = trainer.learn_stream(stream)
    assert min(report.accuracy_matrix[-1]) > 0.7
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "method.safetensors").items()}
    entries = {"means": (6, WIDTH), "factors": (6, WIDTH, WIDTH), "counts": (6,), "owners": (6,), "classes": (6,)}
    assert shapes == {f"gaussians.{name}": shape for name, shape in entries.items()}
    loaded = ContinualModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images()).logits, trainer.model(images()).logits)
        alone = torch.cat([loaded(one[None]).logits for one in images()])
    torch.testing.assert_close(alone, loaded(images()).logits, atol=1e-4, rtol=1e-4)
    assert loaded.method.gaussians.owners.tolist() == [0, 0, 1, 1, 1, 2]
    assert loaded.bank.names == ["all-tasks"] and loaded.heads.single == [False] * 3
    with pytest.raises(ConfigError, match="All tasks trained the same parameters"):
        loaded.remove("first")


def test_rows_of_a_single_class_task_apply_to_all_images():
    heads = AlignedHeads(2)
    heads.write(torch.eye(2), torch.zeros(2), [0, 1], single=True)
    assert heads(torch.ones(1, 2), torch.tensor([0])).isfinite().all()


def test_gaussians_of_other_tasks_are_refused():
    model = started(slca(), tasks=1)
    finish(model, seed=1)
    model.method.gaussians.owners[-1] = 0
    model.method.gaussians.owners[-2] = 0
    with pytest.raises(ConfigError, match="class Gaussians are of the tasks"):
        model.method.check()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: slca(slow=2.0), "slow=2.0 must be between 0 and 1"),
        (lambda: slca(temperature=0.0), "temperature=0.0 must be between"),
        (lambda: ssiat(drift="linear"), "drift='linear'"),
        (lambda: ssiat(scale=0.0), "scale=0.0 must be between"),
        (lambda: ssiat(margin=-1.0), "margin=-1.0 must be between"),
    ],
)
def test_options_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("name", METHODS)
def test_digits_are_remembered_where_plain_fine_tuning_forgets_them(name, tmp_path):
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=24)
    trainer = make_trainer(METHODS[name], tmp_path, num_train_epochs=3, learning_rate=5e-3)
    assert trainer.learn_stream(stream).summary()["average_accuracy"] > 0.6  # sequential_lora: 0.2
