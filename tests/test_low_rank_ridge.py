"""Ridge regression with a Gram matrix of low rank, and LoRanPAC on top of it."""

import shutil

import pytest
import torch
from conftest import BACKBONE, make_trainer, pattern_dataset, vouch
from safetensors.torch import load_file, save_file
from test_class_routers import WIDTH, images, learn, of_classes

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    LowRankRidgeRouter,
    RidgeRouter,
    TaskStream,
    combine,
    load_benchmark,
    loranpac,
    loranpac_first,
    s_lora,
    s_lora_mix,
)
from hf_clpeft.routing import low_rank_ridge
from hf_clpeft.routing.ridge import RIDGES, best_penalty, penalty_errors


TASKS = [[0, 1], [2], [3, 4, 5], [0, 6]]


def make(rank=400, size=300):
    return LowRankRidgeRouter(WIDTH, projection_size=size, rank=rank)


def gram(router):
    return (router.basis * router.spectrum**2) @ router.basis.T


def with_penalty(router, penalty):
    """The same router with a penalty that one chooses oneself."""
    if isinstance(router, LowRankRidgeRouter):
        router.errors = torch.tensor([0.0 if each == penalty else 1.0 for each in RIDGES])
    else:
        router.penalty = torch.tensor(penalty)
    router.derive()
    return router


@pytest.mark.parametrize("penalty", [100.0, 1e4])
def test_while_the_rank_suffices_it_is_ridge_with_the_whole_gram_matrix(penalty):
    full, low = learn(RidgeRouter(WIDTH, projection_size=300), *TASKS), learn(make(), *TASKS)
    assert low.basis.shape[1] == len(low.spectrum) <= 240  # images
    torch.testing.assert_close(gram(low), full.gram, atol=1e-5 * float(full.gram.max()), rtol=1e-4)
    torch.testing.assert_close(low.basis.T @ low.basis, torch.eye(len(low.spectrum)), atol=1e-5, rtol=0)
    query, labels = images([0, 1, 2, 3, 4, 5, 6], seed=99)
    wanted, found = (of_classes(with_penalty(router, penalty), query) for router in (full, low))
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
    assert (found.argmax(dim=1) == labels).float().mean() > 0.95


def test_a_small_penalty_is_not_lost_in_the_rounding_of_large_numbers():
    low, full = make(), RidgeRouter(WIDTH, projection_size=300)
    features, labels = images([0, 1, 2], count=40)
    for router in (low, full):
        for part in (slice(0, 60), slice(60, 120)):
            router.learn(features[part], labels[part])
    hidden = torch.relu(features @ low.projection).double()
    owners = torch.nn.functional.one_hot(labels + 2 * (torch.arange(120) >= 60)).double()[:, [0, 1, 3, 4]]
    query = images([0, 1, 2], seed=9)[0]
    dual = torch.linalg.solve(hidden @ hidden.T + 0.1 * torch.eye(120), owners)
    wanted = torch.relu(query @ low.projection).double() @ hidden.T @ dual
    low_error, full_error = ((with_penalty(router, 0.1).scores(query) - wanted).abs().max() for router in (low, full))
    assert low_error < 0.01 < full_error  # of a Gram matrix in float32, which is singular


def test_what_is_dropped_are_the_directions_of_least_variance():
    low, whole = make(rank=25), make()
    features = torch.cat([images(classes, seed=i)[0] for i, classes in enumerate(TASKS)])
    for router in (low, whole):
        router.learn(features, torch.arange(len(features)) % 3)
    values, vectors = torch.linalg.eigh(gram(whole).double())
    assert low.basis.shape == (300, 25)
    torch.testing.assert_close(low.spectrum.double(), values.flip(0)[:25].sqrt(), atol=1e-4, rtol=1e-4)
    # The regression is that on the features projected on what is left, as if the others had an endless penalty.
    basis = vectors.flip(1)[:, :25]
    hidden = torch.relu(features @ low.projection).double() @ basis
    targets = torch.nn.functional.one_hot(torch.arange(len(features)) % 3).double()
    weights = torch.linalg.solve(hidden.T @ hidden + 10.0 * torch.eye(25), hidden.T @ targets)
    query = images([0, 3, 6], seed=99)[0]
    wanted = torch.relu(query @ low.projection).double() @ basis @ weights
    torch.testing.assert_close(with_penalty(low, 10.0).scores(query).double(), wanted, atol=1e-3, rtol=1e-3)


def test_a_rank_that_is_too_small_costs_accuracy_step_by_step():
    features, labels = images(range(20), count=10)
    query, wanted = images(range(20), seed=99)
    found = []
    for rank in (2, 8, 200):
        router = make(rank=rank)
        for part in range(4):
            own = labels // 5 == part
            router.learn(features[own], labels[own])
        assert router.basis.shape[1] <= rank
        found.append((of_classes(router, query).argmax(dim=1) == wanted).float().mean())
    assert found[0] < found[1] < found[2] and found[2] > 0.9


@pytest.mark.parametrize("rank", [400, 60])
def test_the_order_of_tasks_does_not_matter(rank):
    there, back = make(rank), make(rank)
    for router, order in ((there, (0, 1, 2)), (back, (2, 0, 1))):
        for number in order:
            router.learn(*images(TASKS[number], seed=number))
    query, _ = images([0, 1, 2, 3, 4, 5], seed=9)
    torch.testing.assert_close(there.errors, back.errors)
    # With 180 images, rank 60 drops little, but not the same.
    close = {"atol": 1e-3, "rtol": 1e-3} if rank == 400 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(of_classes(there, query), of_classes(back, query), **close)


def test_a_merged_router_is_the_one_that_learnt_everything():
    query, _ = images([0, 1, 2, 3], seed=5)
    whole, half, other = learn(make(), [0, 1], [2, 3]), learn(make(), [0, 1]), make()
    features, labels = images([2, 3], seed=1 + 5)
    other.learn(features, labels - 2)  # over there it is another number
    half.merge(other, [2, 3])
    torch.testing.assert_close(half.errors, whole.errors)
    assert half(query).selection.tolist() == whole(query).selection.tolist()
    torch.testing.assert_close(of_classes(half, query), of_classes(whole, query), atol=1e-3, rtol=1e-3)
    empty = make()
    empty.merge(whole, [0, 1, 2, 3])
    torch.testing.assert_close(of_classes(empty, query), of_classes(whole, query), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", [RidgeRouter, LowRankRidgeRouter])
def test_routers_with_other_random_features_are_not_merged(kind):
    ours, theirs = (learn(kind(WIDTH, projection_size=size), [0, 1]) for size in (30, 40))
    with pytest.raises(ConfigError, match="different random features.*projection_size.*must be the same"):
        ours.merge(theirs, [0, 1])


def test_many_images_are_added_piece_by_piece(monkeypatch):
    whole = learn(make(), [0, 1, 2])
    monkeypatch.setattr(low_rank_ridge, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(gram(learn(make(), [0, 1, 2])), gram(whole), atol=1e-2, rtol=1e-4)


def test_images_more_than_random_features_are_as_good():
    router, full = learn(make(size=20), [0, 1, 2], [3]), learn(RidgeRouter(WIDTH, projection_size=20), [0, 1, 2], [3])
    assert router.basis.shape == (20, 20)
    query = images([0, 3], seed=9)[0]
    wanted, found = (of_classes(with_penalty(each, 1.0), query) for each in (full, router))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_the_penalty_is_the_best_for_the_held_out_images_of_all_tasks():
    router = learn(make(), [0, 1], [2, 3, 4])
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for i, classes in enumerate(([0, 1], [2, 3, 4])):
        features, labels = images(classes, seed=i + sum(classes))
        hidden = torch.relu(features @ router.projection).double()
        targets = torch.nn.functional.one_hot(labels - labels.min()).double()
        errors += len(hidden) // 5 * len(classes) * penalty_errors(hidden[:, None], targets)
    torch.testing.assert_close(router.errors.double(), errors, rtol=1e-4, atol=1e-6)
    assert best_penalty(router.errors) == RIDGES[int(errors.argmin())]
    assert best_penalty(learn_few().errors) == 1.0


def learn_few():
    router = make()
    router.learn(*images([0, 1], count=1))
    return router


def test_one_image_of_each_class_or_none_with_features_is_enough_to_begin_with():
    assert learn_few()(images([0, 1], seed=3)[0]).scores.isfinite().all()
    router = make()
    router.learn(torch.zeros(4, WIDTH), torch.tensor([0, 0, 1, 1]))
    assert router.basis.shape == (300, 0) and router(torch.ones(1, WIDTH)).scores.tolist() == [[0, 0]]
    router.learn(*images([0, 1]))
    assert (of_classes(router, images([0, 1], seed=3)[0]).argmax(dim=1) == images([0, 1])[1]).float().mean() > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_not_fitted(seed, monkeypatch):
    monkeypatch.setattr(low_rank_ridge, "best_penalty", lambda errors: 1e-8)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, 32, generator=generator)
    numbers = torch.arange(2).repeat(100)
    features = 10 * (centres[numbers] + 0.3 * torch.randn(200, 32, generator=generator))
    router = LowRankRidgeRouter(query_size=32, projection_size=1000)
    for part in (slice(0, 50), slice(50, 100)):
        router.learn(features[part], numbers[part])
    assert (router.class_scores(router.scores(features[100:])).argmax(dim=1) == numbers[100:]).float().mean() > 0.95


def test_what_is_saved_comes_back_as_it_was():
    query, _ = images([0, 1, 2, 3], seed=5)
    router, loaded = learn(make(rank=50), [0, 1], [2, 3]), make(rank=50)
    assert {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()} == {
        "prototypes": (4, WIDTH),
        "counts": (4,),
        "owners": (4,),
        "classes": (4,),
        "projection": (WIDTH, 300),
        "moments": (4, 300),
        "basis": (300, 50),
        "spectrum": (50,),
        "errors": (len(RIDGES),),
    }
    loaded.load(router.state_dict(), num_tasks=2, num_classes=4)
    assert torch.equal(loaded(query).scores, router(query).scores)
    for each in (loaded, router):
        each.learn(*images([4], seed=7))
    assert torch.equal(loaded(query).scores, router(query).scores)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"basis": lambda t: t[:-1]}, "basis has shape"),
        ({"basis": lambda t: t[:, :-1]}, "basis has shape"),
        ({"basis": lambda t: t[0]}, "basis has shape"),
        ({"spectrum": lambda t: t[None]}, "spectrum"),
        ({"basis": lambda t: t.repeat(1, 2), "spectrum": lambda t: t.repeat(2)}, "with r up to 50"),
        ({"spectrum": lambda t: -t}, "spectrum has numbers below 0"),
        ({"errors": lambda t: t - 1e9}, "errors has numbers below 0"),
        ({"errors": lambda t: t[:-1]}, "errors has shape"),
        ({"basis": lambda t: t * torch.nan}, "not finite"),
        ({"spectrum": lambda t: t * torch.inf}, "not finite"),
        ({"moments": lambda t: t.double()}, "float64"),
        ({"projection": lambda t: t[:, :-1]}, "projection has shape"),
    ],
)
def test_what_does_not_fit_is_not_loaded(change, message):
    tensors = learn(make(rank=50), [0, 1], [2, 3]).state_dict()
    tensors |= {name: act(tensors[name]) for name, act in change.items()}
    with pytest.raises(ValueError, match=message):
        make(rank=50).load(tensors, num_tasks=2, num_classes=4)


# The methods


@pytest.fixture(scope="module")
def digits():
    return load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=24)


@pytest.fixture(scope="module")
def patterns():
    return TaskStream.class_incremental(pattern_dataset(), num_tasks=2)


@pytest.mark.parametrize("method", [loranpac, loranpac_first], ids=lambda method: method.name)
def test_digits_are_learnt_without_forgetting(method, digits, tmp_path):
    trainer = make_trainer(method(projection_size=500, rank=200), tmp_path, num_train_epochs=1, train_batch_size=16)
    summary = trainer.learn_stream(digits).summary()
    assert summary["average_accuracy"] > 0.5
    model = trainer.model
    with pytest.raises(
        ConfigError, match="cannot be removed exactly, as the sums of its router hold the images of all"
    ):
        model.remove("task-001")
    assert combine([model, model]).router.num_owners == 2 * len(digits)  # what cannot be removed counts twice


def test_experts_that_it_routes_to_are_combined(patterns, tmp_path):
    options = {"router": "low_rank_ridge", "projection_size": 300}
    for task in patterns:
        make_trainer(s_lora(**options), tmp_path / task.name, num_train_epochs=1).learn(task)
    both = combine([tmp_path / "task-000", tmp_path / "task-001"])
    make_trainer(s_lora(**options), tmp_path / "whole", num_train_epochs=1).learn_stream(patterns)
    whole = ContinualModel.from_pretrained(tmp_path / "whole")
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(both(pixels).distances, whole(pixels).distances, atol=1e-3, rtol=1e-3)


def test_a_damaged_file_is_named(patterns, tmp_path):
    make_trainer(loranpac(projection_size=100, rank=50), tmp_path / "whole").learn(patterns[0])
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    tensors = load_file(folder / "router.safetensors")
    save_file({**tensors, "spectrum": -tensors["spectrum"]}, folder / "router.safetensors")
    vouch(folder)
    with pytest.raises(ConfigError, match=r"router.safetensors does not fit the model: spectrum has numbers below 0"):
        ContinualModel.from_pretrained(folder)


@pytest.mark.parametrize("rank", [0, 100_001])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ConfigError, match=f"rank={rank} must be between 1 and 100,000"):
        loranpac(rank=rank)


def test_its_scores_are_no_likelihoods():
    with pytest.raises(ConfigError, match="the scores of 'low_rank_ridge' are none"):
        ContinualModel.from_backbone(BACKBONE, s_lora_mix(router="low_rank_ridge"))
