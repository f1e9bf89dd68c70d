"""KLDA: linear discriminant analysis on random Fourier features."""

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import BACKBONE, make_trainer, pattern_dataset, vouch
from safetensors.torch import load_file, save_file
from test_class_routers import WIDTH, images, learn, of_classes

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    GaussianRouter,
    KldaRouter,
    TaskStream,
    combine,
    klda,
    load_benchmark,
    s_lora,
    s_lora_mix,
)
from hf_clpeft.routing.covariance import shrink


def make(features=60, width=1.0):
    return KldaRouter(WIDTH, kernel_features=features, kernel_width=width)


@pytest.mark.parametrize("width", [0.5, 1.0, 3.0])
def test_scalar_products_of_random_features_approximate_the_kernel(width):
    router = make(20_000, width)
    router._allocate()
    features = images([0, 1, 2], count=4)[0]
    normalized = torch.nn.functional.normalize(features, dim=-1)
    kernel = torch.exp(-(torch.cdist(normalized, normalized) ** 2) / (2 * width**2))
    lifted = router._lift(features)
    torch.testing.assert_close(lifted @ lifted.T, kernel, atol=0.04, rtol=0)
    torch.testing.assert_close(router._lift(5 * features), lifted, atol=1e-5, rtol=0)


def test_scores_are_log_likelihoods_of_the_naive_discriminant():
    router = learn(make(), [0, 1], [1, 2])
    groups = [(0, 0, 1), (1, 0, 1), (1, 1, 4), (2, 1, 4)]  # class, task, seed

    def lift(features):
        normalized = features.double() / features.double().norm(dim=1, keepdim=True)
        waves = normalized @ router.frequencies.double() + router.phases.double()
        return math.sqrt(2 / 60) * torch.cos(waves)

    means, scatter = [], torch.zeros(60, 60, dtype=torch.float64)
    for number, task, seed in groups:
        features, labels = images([[0, 1], [1, 2]][task], seed=seed)
        own = lift(features[labels == number])
        means.append(own.mean(dim=0))
        scatter += (own - own.mean(dim=0)).T @ (own - own.mean(dim=0))
    torch.testing.assert_close(router.sum_up(), scatter, atol=1e-5, rtol=1e-4)
    covariance = shrink(scatter / (120 - 4), 120 - 4, WIDTH)
    query = images([0, 1, 2], seed=9)[0]
    offsets = lift(query)[:, None] - torch.stack(means)
    wanted = -torch.einsum("nci,ij,ncj->nc", offsets, torch.linalg.inv(covariance), offsets) / 2
    torch.testing.assert_close(router.scores(query).double(), wanted, atol=1e-2, rtol=1e-4)
    # A class of two tasks is a mixture.
    merged = torch.stack([wanted[:, 0], torch.logsumexp(wanted[:, 1:3], dim=1), wanted[:, 3]], dim=1)
    torch.testing.assert_close(of_classes(router, query).double(), merged, atol=1e-2, rtol=1e-4)
    routing = router(query)
    best = torch.stack([wanted[:, :2].amax(dim=1), wanted[:, 2:].amax(dim=1)], dim=1)
    torch.testing.assert_close(routing.distances.double(), (-2 * best).sqrt(), atol=1e-2, rtol=1e-3)


def test_it_separates_what_no_line_separates():
    generator = torch.Generator().manual_seed(0)
    angles = 2 * math.pi * torch.rand(600, generator=generator)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = (angles // (math.pi / 4)).long() % 2  # eight sectors of two classes in turn
    accuracies = []
    for router in (GaussianRouter(2), KldaRouter(2, kernel_features=300, kernel_width=0.3)):
        router.learn(features[:300], labels[:300])
        found = of_classes(router, features[300:]).argmax(dim=1)
        accuracies.append((found == labels[300:]).float().mean().item())
    assert accuracies[0] < 0.7 and accuracies[1] > 0.9


def test_shrinkage_does_not_depend_on_the_number_of_random_features():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = features.T @ features / 40
    wanted = shrink(covariance, freedom=40)
    spread = torch.linalg.qr(torch.randn(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    found = shrink(spread @ covariance @ spread.T, freedom=40, dimensions=5)  # the same in 50 dimensions
    torch.testing.assert_close(spread.T @ found @ spread, wanted)
    other = torch.linalg.qr(spread, mode="complete").Q[:, 5:]
    weight = 1 - (wanted[0, 1] / covariance[0, 1])
    torch.testing.assert_close(other.T @ found @ other, weight * covariance.trace() / 5 * torch.eye(45).double())


def test_an_image_goes_to_the_owner_of_its_class_whatever_the_batch():
    router = learn(make(300), [0, 1, 2], [3], [4, 5])
    query, labels = images([0, 1, 2, 3, 4, 5], seed=99)
    routing = router(query)
    assert (routing.selection == torch.tensor([0, 0, 0, 1, 2, 2])[labels]).float().mean() > 0.95
    assert (of_classes(router, query).argmax(dim=1) == labels).float().mean() > 0.95
    assert routing.selection.tolist() == [router(row[None]).selection.item() for row in query]


def test_the_order_of_tasks_does_not_matter():
    query, _ = images([0, 1, 2, 3], seed=5)
    there, back = learn(make(), [0, 1], [2, 3]), make()
    for classes in ([2, 3], [0, 1]):
        back.learn(*images(classes, seed=sum(classes) + (classes == [2, 3])))
    torch.testing.assert_close(of_classes(there, query), of_classes(back, query), atol=1e-2, rtol=1e-3)


def test_a_merged_router_is_the_one_that_learnt_everything():
    query, _ = images([0, 1, 2, 3], seed=5)
    whole, half, other = learn(make(), [0, 1], [2, 3]), learn(make(), [0, 1]), make()
    features, labels = images([2, 3], seed=1 + 5)
    other.learn(features, labels - 2)  # over there it is another number
    half.merge(other, [2, 3])
    assert half(query).selection.tolist() == whole(query).selection.tolist()
    torch.testing.assert_close(of_classes(half, query), of_classes(whole, query), atol=1e-2, rtol=1e-3)
    empty = make()
    empty.merge(whole, [0, 1, 2, 3])
    assert torch.equal(empty(query).scores, whole(query).scores)


@pytest.mark.parametrize("options", [{"features": 50}, {"width": 2.0}], ids=str)
def test_routers_with_other_random_features_are_not_merged(options):
    ours = learn(make(), [0, 1])
    with pytest.raises(ConfigError, match="different random features.*kernel_features and kernel_width must be"):
        ours.merge(learn(make(**options), [0, 1]), [0, 1])


def test_what_is_saved_comes_back_as_it_was():
    query, _ = images([0, 1, 2, 3], seed=5)
    router, loaded = learn(make(), [0, 1], [2, 3]), make()
    assert {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()} == {
        "prototypes": (4, WIDTH),
        "counts": (4,),
        "owners": (4,),
        "classes": (4,),
        "few": (4,),
        "scatter": (0, 0),
        "factors": (58 + 58, 60),
        "ranks": (2,),
        "rests": (2, 60),
        "thresholds": (2, 100),
        "frequencies": (WIDTH, 60),
        "phases": (60,),
        "means": (4, 60),
    }
    loaded.load(router.state_dict(), num_tasks=2, num_classes=4)
    assert torch.equal(loaded(query).scores, router(query).scores)
    assert sum(tensor.numel() for tensor in make().state_dict().values()) == 0  # nothing before the first task


def test_one_image_of_each_class_is_enough_to_begin_with():
    router = make()
    router.learn(*images([0, 1], count=1))
    assert router(images([0, 1], seed=3)[0]).scores.isfinite().all()


@pytest.mark.parametrize(
    "name, change",
    [
        ("factors", lambda t: t[:-1]),
        ("factors", lambda t: t * torch.nan),
        ("rests", lambda t: t - 1),
        ("ranks", lambda t: -t),
        ("ranks", lambda t: t[:1]),
        ("scatter", lambda t: torch.ones(5, 5)),
        ("means", lambda t: t[:, :-1]),
        ("means", lambda t: t * torch.inf),
        ("frequencies", lambda t: t[:-1]),
        ("frequencies", lambda t: t * torch.nan),
        ("phases", lambda t: t[:-1]),
        ("phases", lambda t: t.double()),
        ("owners", lambda t: t + 1),
        ("counts", lambda t: t * 0),
    ],
)
def test_what_does_not_fit_is_not_loaded(name, change):
    tensors = learn(make(), [0, 1], [2, 3]).state_dict()
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError):
        make().load(tensors, num_tasks=2, num_classes=4)


# The method, and the router in others


@pytest.fixture(scope="module")
def digits():
    return load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=24)


@pytest.fixture(scope="module")
def patterns():
    return TaskStream.class_incremental(pattern_dataset(), num_tasks=2)


def test_digits_are_learnt_without_forgetting(digits, tmp_path):
    trainer = make_trainer(klda(kernel_features=400), tmp_path)
    assert trainer.learn_stream(digits).summary()["average_accuracy"] > 0.5


@pytest.mark.parametrize("method", [s_lora(router="klda"), s_lora_mix(router="klda", mix=2)], ids=lambda m: m.name)
def test_it_routes_to_experts(method, patterns, tmp_path, monkeypatch):
    monkeypatch.setattr(KldaRouter.__init__, "__defaults__", (200, 1.0, None))
    report = make_trainer(method, tmp_path, learning_rate=1e-2).learn_stream(patterns)
    assert report.summary()["average_accuracy"] > 0.5
    model = ContinualModel.from_pretrained(tmp_path)
    assert type(model.router) is KldaRouter and model.router.num_features == 200


def test_experts_that_it_routes_to_are_combined(patterns, tmp_path, monkeypatch):
    monkeypatch.setattr(KldaRouter.__init__, "__defaults__", (200, 1.0, None))
    for task in patterns:
        make_trainer(s_lora(router="klda"), tmp_path / task.name, num_train_epochs=1).learn(task)
    both = combine([tmp_path / "task-000", tmp_path / "task-001"])
    assert both.router.num_owners == 2 and len(both.router.means) == 4


def test_a_damaged_file_is_named(patterns, tmp_path):
    make_trainer(klda(kernel_features=50), tmp_path / "whole").learn(patterns[0])
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    tensors = load_file(folder / "router.safetensors")
    save_file({**tensors, "phases": tensors["phases"][:5].clone()}, folder / "router.safetensors")
    vouch(folder)
    with pytest.raises(ConfigError, match=r"router.safetensors does not fit the model: phases has shape \(5,\)"):
        ContinualModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel_features": 0}, "kernel_features=0 must be between 1 and 100,000"),
        ({"kernel_width": 0.0}, "kernel_width=0.0 must be above 0"),
        ({"kernel_width": float("nan")}, "kernel_width=nan must be above 0"),
        ({"kernel_width": np.inf}, "kernel_width=inf must be above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        klda(**options)


def test_any_closed_form_can_use_it():
    model = ContinualModel.from_backbone(BACKBONE, METHODS["closed_form"].Config(router="klda"))
    assert type(model.router) is KldaRouter and model.router.kernel_features == 5_000
