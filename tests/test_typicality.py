"""How typical an image is: conformal p-values of Mahalanobis distances, from each task alone."""

import numpy as np
import pytest
import torch
from conftest import make_trainer, pattern_dataset

from hf_clpeft import ConfigError, ContinualModel, TaskStream, ranpac, s_lora, s_lora_mix, slda
from hf_clpeft.demo.views import verdict
from hf_clpeft.routing import ROUTERS, GaussianRouter
from hf_clpeft.routing.covariance import factorize, shrink
from hf_clpeft.routing.typicality import FOLDS, Metric, cross_fit, fit_thresholds


WIDTH = 16


class Task:
    """Images of a few classes that vary along directions of their own."""

    def __init__(self, seed, classes=4):
        generator = torch.Generator().manual_seed(seed)
        self.centres = 2 * torch.randn(classes, WIDTH, generator=generator)
        self.spread = 0.4 * torch.randn(WIDTH, WIDTH, generator=generator)
        self.generator = generator

    def images(self, count, views=1):
        labels = torch.arange(count) % len(self.centres)
        noise = torch.randn(count, views, WIDTH, generator=self.generator)
        wide = torch.exp(0.3 * torch.randn(count, 1, 1, generator=self.generator))  # tails that are none of a Gaussian
        return self.centres[labels][:, None] + wide * noise @ self.spread, labels


@pytest.mark.parametrize("name, rank", [("gaussian", None), ("gaussian", 4), ("klda", None)])
@pytest.mark.parametrize("count, views", [(100, 1), (400, 3)])
def test_of_images_that_were_learnt_as_many_are_rejected_as_stated(name, rank, count, views):
    tasks, router = [Task(seed) for seed in range(3)], ROUTERS[name](WIDTH)
    router.covariance_rank, router.kernel_features = rank, 60
    for number, task in enumerate(tasks):
        features, labels = task.images(count, views)
        router.learn(features, labels + 4 * number)
    assert router.calibrated() == [True, True, True]
    query = torch.cat([task.images(1000)[0][:, 0] for task in tasks])
    found = router.typicality(query, router(query).distances)
    for rate in (0.05, 0.2, 0.5):
        assert (found < rate).float().mean().item() == pytest.approx(rate, abs=0.25 * rate + 0.02)
    strange = Task(7).images(300)[0][:, 0]
    least = 0.9 if name == "gaussian" else 0.4  # Fourier features tell less of what is far
    assert (router.typicality(strange, router(strange).distances) < 0.05).float().mean() > least


def test_with_few_images_a_class_as_many_are_rejected_as_stated():
    rejected = []
    for seed in range(30):
        task, router = Task(seed), GaussianRouter(WIDTH, 8)
        features, labels = task.images(4 * 6)
        router.learn(features, labels)
        query = task.images(200)[0][:, 0]
        rejected.append((router.typicality(query, router(query).distances) < 0.1).float().mean())
    assert torch.stack(rejected).mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("count", [21, 30, 99, 118])
def test_a_threshold_is_exceeded_by_its_percentage_whatever_the_number_of_distances(count):
    drawn = np.random.default_rng(0).random((4000, count))  # a new one exceeds t with a probability of 1 - t
    mean = np.mean([fit_thresholds(distances) for distances in drawn], axis=0)
    assert 1 - mean[4:95] == pytest.approx(np.arange(5, 96) / 100, abs=0.003)


def test_it_depends_on_the_nearest_task_alone():
    tasks = [Task(seed) for seed in range(3)]
    learnt = [task.images(100) for task in tasks]
    alone, all_three = GaussianRouter(WIDTH), GaussianRouter(WIDTH)
    for number, (features, labels) in enumerate(learnt):
        all_three.learn(features, labels + 4 * number)
    alone.learn(*learnt[1])
    query = tasks[1].images(50)[0][:, 0]
    distances = torch.tensor([[9.0, 1.0, 9.0]]).expand(50, 3)
    found = all_three.typicality(query, distances)
    assert torch.equal(found, alone.typicality(query, distances[:, 1:2]))
    assert torch.equal(all_three.thresholds[1:2], alone.thresholds)
    all_three.remove(0, {number + 4: number for number in range(8)})
    assert torch.equal(all_three.typicality(query, distances[:, 1:]), found)
    one = torch.cat([all_three.typicality(query[i : i + 1], distances[:1, 1:]) for i in range(50)])
    assert torch.equal(one, found)
    views = torch.stack([query, torch.zeros_like(query)], dim=1)
    assert torch.equal(all_three.typicality(views, distances[:, 1:]), found)  # the first view counts


def test_the_metric_is_that_of_the_shrunk_covariance():
    residuals = torch.randn(60, 1, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    router = GaussianRouter(WIDTH)
    for rank in (None, 5):
        factor, rest = factorize(residuals, rank)
        covariance = shrink((factor.T @ factor + rest.diag()) / 50, 50)
        rows = torch.randn(7, WIDTH, dtype=torch.float64)
        wanted = torch.einsum("ni,ij,nj->n", rows, torch.linalg.inv(covariance), rows)
        torch.testing.assert_close(router._metric(factor, rest, 50).squared(rows), wanted)
    assert Metric.of(torch.zeros(0, 2), torch.ones(2)).squared(torch.tensor([3.0, 4.0])) == 25


def test_no_image_is_measured_by_a_fit_that_knows_it():
    entries = torch.arange(23) % 3
    seen = []

    def fit(fitted, held_out):
        assert not set(fitted.tolist()) & set(held_out.tolist())
        assert len(entries[fitted].unique()) == 3
        seen.append(held_out)
        return held_out.float()

    assert cross_fit(entries, fit).tolist() == list(range(23)) and len(seen) == FOLDS
    few = cross_fit(torch.tensor([0, 0, 1]), lambda fitted, held_out: torch.ones(len(held_out)))
    assert few.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["prototypes", "gaussian", "klda"])
@pytest.mark.parametrize("noise", [0, 1e-6])
def test_rounding_does_not_reject_an_image_of_which_there_are_only_copies(name, noise):
    one = torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    copies = one + noise * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    query = torch.cat([one + 2e-5, one + 0.05])
    features = Task(0).centres.repeat(25, 1)
    features += 0.1 * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    for learns_few in (False, True):
        router = ROUTERS[name](WIDTH)
        router.kernel_features = 60
        router.learn(features, torch.arange(100) % 4)
        router.learns_few = learns_few
        router.learn(copies, torch.full((5,), 4))
        routing = router(query)
        assert routing.selection[0] == 1 and router.typicality(query, routing.distances).tolist() == [1, 0]


def test_too_few_images_are_not_measured():
    router = GaussianRouter(WIDTH)
    router.learn(torch.randn(2, WIDTH), torch.tensor([0, 1]))
    router.learn(torch.randn(20, WIDTH), torch.arange(20) % 2)
    assert router.calibrated() == [False, True]


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(), num_tasks=2)


@pytest.mark.parametrize(
    "method", [slda(), s_lora(router="gaussian"), s_lora_mix(mix=2, test_views=2)], ids=lambda method: method.name
)
def test_models_reject_load_and_say_so(method, stream, tmp_path):
    make_trainer(method, tmp_path, num_train_epochs=1).learn_stream(stream)
    model = ContinualModel.from_pretrained(tmp_path)
    assert model.can_reject and "reject_rate" in (tmp_path / "README.md").read_text()
    images = [image for image, _, _ in stream[0].train]
    found = model.predict(images)
    assert all(0 <= one.typicality <= 1 for one in found)
    assert "of 100 pictures like those it learnt" in verdict(found[0], model, reject_rate=0.05)
    assert [one.label is None for one in model.predict(images, reject_rate=0.9)] == [
        one.typicality < 0.9 for one in found
    ]
    assert [one.typicality for one in found] == [model.predict(image)[0].typicality for image in images]


def test_a_model_that_cannot_says_what_can(stream, tmp_path):
    make_trainer(ranpac(projection_size=20), tmp_path).learn_stream(stream)
    with pytest.raises(ConfigError, match="router='gaussian' in an S-X method, or s_lora_mix"):
        ContinualModel.from_pretrained(tmp_path).predict([image for image, _, _ in stream[0].test], reject_rate=0.1)


def test_a_model_that_was_saved_before_cannot_either(backbone):
    old = ContinualModel.from_pretrained("hf-clpeft/s-lora-mix-digits", backbone=backbone)
    if not len(old.router.ranks):
        assert "were saved before that was measured" in old.method.why_no_reject()
