"""Class Gaussians hold what their formulas say, and a head aligned on them knows old classes as well as new ones."""

import pytest
import torch

from hf_clpeft import ConfigError
from hf_clpeft.methods.alignment import ClassGaussians, align, normalize_logits
from hf_clpeft.methods.state import load_state
from hf_clpeft.routing.covariance import shrink


WIDTH = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(classes, per_class=8, seed=0):
    """Features around a mean far from those of other classes, with a covariance that is no multiple of 1."""
    noise = generator(seed)
    labels = torch.tensor(classes).repeat_interleave(per_class)
    means = 6 * torch.randn(50, WIDTH, generator=generator(1))
    spread = torch.randn(WIDTH, WIDTH, generator=generator(2))
    return means[labels] + torch.randn(len(labels), WIDTH, generator=noise) @ spread, labels


@pytest.fixture
def gaussians():
    """Of two tasks, of which the second brings class 1 again."""
    gaussians = ClassGaussians(WIDTH)
    gaussians.learn(*images([0, 1]))
    gaussians.learn(*images([1, 2, 3], seed=3))
    return gaussians


def test_an_entry_is_a_class_of_a_task(gaussians):
    assert gaussians.classes.tolist() == [0, 1, 1, 2, 3] and gaussians.owners.tolist() == [0, 0, 1, 1, 1]
    assert gaussians.counts.tolist() == [8] * 5 and gaussians.num_owners == 2
    features, labels = images([1, 2, 3], seed=3)
    torch.testing.assert_close(gaussians.means[2], features[labels == 1].mean(dim=0))


@pytest.mark.parametrize("per_class", [1, 2, 5, 500])
def test_a_covariance_is_that_of_the_class_and_of_its_task_in_proportion_to_the_images(per_class):
    gaussians = ClassGaussians(WIDTH)
    features, labels = images([0, 1, 2], per_class)
    features[labels == 1] *= 2
    gaussians.learn(features, labels)
    pooled = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for number in range(3):
        own = features[labels == number].double()
        pooled += (own - own.mean(dim=0)).T @ (own - own.mean(dim=0))
    freedom = max(1, 3 * per_class - 3)
    pooled = shrink(pooled / freedom, freedom)
    for number, covariance in enumerate(gaussians.covariances):
        own = features[labels == number].double()
        scatter = sum((torch.outer(row, row) for row in own - own.mean(dim=0)), torch.zeros_like(pooled))
        expected = (scatter + 0.1 * WIDTH * pooled) / (per_class - 1 + 0.1 * WIDTH)
        torch.testing.assert_close(covariance.double(), expected, atol=1e-4, rtol=1e-4)
    if per_class == 500:
        torch.testing.assert_close(covariance, torch.cov(own.T).float(), atol=0.1, rtol=0.1)


def test_samples_have_the_mean_and_the_covariance_of_their_class(gaussians):
    features, labels = gaussians.sample(20_000, generator())
    assert labels.bincount().tolist() == [20_000] * 4  # class 1 is shared by its two entries
    own = features[labels == 2]
    torch.testing.assert_close(own.mean(dim=0), gaussians.means[3], atol=0.1, rtol=0.05)
    torch.testing.assert_close(torch.cov(own.T), gaussians.covariances[3], atol=0.5, rtol=0.1)
    own = features[labels == 1]
    torch.testing.assert_close(own.mean(dim=0), gaussians.means[1:3].mean(dim=0), atol=0.1, rtol=0.05)


def test_samples_of_a_class_are_as_many_whatever_its_number_of_entries(gaussians):
    gaussians.learn(*images([1, 2], seed=4))
    for per_class in (1, 2, 5):
        _, labels = gaussians.sample(per_class, generator())
        assert labels.bincount().tolist() == [per_class] * 4


def test_samples_follow_from_the_seed_alone(gaussians):
    first, _ = gaussians.sample(3, generator())
    torch.randn(1)
    assert torch.equal(first, gaussians.sample(3, generator())[0])
    assert not torch.equal(first, gaussians.sample(3, generator(1))[0])


def test_a_shift_moves_means_and_a_linear_map_moves_covariances_too(gaussians):
    means, covariances = gaussians.means, gaussians.covariances
    shifts = torch.randn(5, WIDTH, generator=generator())
    gaussians.move(shifts)
    assert torch.equal(gaussians.means, means + shifts) and torch.equal(gaussians.covariances, covariances)
    matrix = torch.randn(WIDTH, WIDTH, generator=generator(1))
    matrix[:, 0] = 0  # of a lower rank
    gaussians.transform(matrix)
    torch.testing.assert_close(gaussians.means, (means + shifts) @ matrix)
    for new, old in zip(gaussians.covariances, covariances, strict=True):
        torch.testing.assert_close(new, matrix.T @ old @ matrix, atol=1e-4, rtol=1e-4)
    assert gaussians.sample(2, generator())[0].isfinite().all()


def test_features_of_the_transformed_images_have_the_transformed_gaussian():
    features, labels = images([0, 1], per_class=400)
    matrix = torch.randn(WIDTH, WIDTH, generator=generator(5))
    before, after = ClassGaussians(WIDTH), ClassGaussians(WIDTH)
    before.learn(features, labels)
    before.transform(matrix)
    after.learn(features @ matrix, labels)
    torch.testing.assert_close(before.means, after.means, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(before.covariances, after.covariances, atol=0.5, rtol=0.05)


def test_normalised_logits_have_one_norm_by_the_mean_of_the_norms_of_the_tasks():
    logits = torch.randn(4, 5, generator=generator(), requires_grad=True)
    groups = torch.tensor([[1.0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])  # class 1 is of two tasks
    expected = torch.stack([row / sum(row[group == 1].norm() for group in groups) * 3 for row in logits])
    torch.testing.assert_close(normalize_logits(logits, groups), expected)
    normalize_logits(0 * logits, groups).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_alignment_gives_old_classes_their_due(gaussians, temperature):
    head = torch.nn.Linear(WIDTH, 4)
    torch.nn.init.normal_(head.weight, generator=generator())
    head.bias.data = torch.tensor([-1.0, 0.0, 1.0, 1.0])  # as if trained on the second task last
    features, labels = gaussians.sample(100, generator(9))
    assert (head(features).argmax(dim=1) == labels).float().mean() < 0.6
    align(head, gaussians, seed=0, temperature=temperature)
    assert (head(features).argmax(dim=1) == labels).float().mean() > 0.95


def test_alignment_follows_from_its_seed_alone_and_works_without_gradients(gaussians):
    def aligned(seed):
        head = torch.nn.Linear(WIDTH, 4)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        align(head, gaussians, seed, epochs=1)
        return head.weight.detach()

    first = aligned(0)
    with torch.no_grad():
        assert torch.equal(first, aligned(0))
    assert not torch.equal(first, aligned(1))


def test_they_come_back_from_a_state_dict_and_what_does_not_fit_is_refused(gaussians):
    loaded = ClassGaussians(WIDTH)
    load_state(loaded, gaussians.state_dict(), loaded.state_dict())
    assert torch.equal(loaded.sample(3, generator())[0], gaussians.sample(3, generator())[0])
    loaded.check(num_tasks=2, num_classes=4)
    for tasks, classes in ((3, 4), (2, 5), (1, 4), (2, 3)):
        with pytest.raises(ConfigError, match=f"but the model has {tasks} tasks and {classes} classes"):
            loaded.check(tasks, classes)
    loaded.counts = loaded.counts[1:]
    with pytest.raises(ConfigError, match="class Gaussians are of the tasks"):
        loaded.check(2, 4)
    gaussians.counts[0] = 0
    with pytest.raises(ConfigError, match="of no images"):
        gaussians.check(2, 4)


def test_they_stay_in_float32_when_a_model_is_cast(gaussians):
    assert gaussians.half().means.dtype == torch.float32 and gaussians.classes.dtype == torch.int64
