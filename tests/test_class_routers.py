"""Routers that know every class: exact sums, whoever adds them in whatever order."""

import numpy as np
import pytest
import torch

from hf_clpeft import ClassMeanRouter, ConfigError, ContinualModel, GaussianRouter, RidgeRouter
from hf_clpeft.methods.mixing import ROUTER_WEIGHT, mix
from hf_clpeft.routing.covariance import shrink
from hf_clpeft.routing.gaussian import log_sum_exp
from hf_clpeft.routing.ridge import RIDGES


WIDTH = 12
MAKERS = [ClassMeanRouter, GaussianRouter, lambda width: RidgeRouter(width, projection_size=40)]


@pytest.fixture(params=MAKERS, ids=["class_means", "gaussian", "ridge"])
def make(request):
    return lambda: request.param(WIDTH)


def images(classes, count=30, seed=0):
    """Features of some classes, and their labels."""
    centres = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor(classes).repeat_interleave(count)
    noise = torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(seed))
    return 3 * (centres[labels] + 0.5 * noise), labels


def learn(router, *tasks):
    for i, classes in enumerate(tasks):
        router.learn(*images(classes, seed=i + sum(classes)))
    return router


def of_classes(router, query):
    return router.class_scores(router(query).scores)


def test_an_image_goes_to_the_owner_of_its_class(make):
    router = learn(make(), [0, 1, 2], [3], [4, 5])
    query, labels = images([0, 1, 2, 3, 4, 5], seed=99)
    routing = router(query)
    owners = torch.tensor([0, 0, 0, 1, 2, 2])[labels]
    assert (routing.selection == owners).float().mean() > 0.95
    assert (of_classes(router, query).argmax(dim=1) == labels).float().mean() > 0.95
    assert routing.distances.shape == (len(query), 3) and (routing.distances >= 0).all()
    assert torch.equal(routing.distances.argmin(dim=1), routing.selection)


def test_a_route_does_not_depend_on_the_rest_of_the_batch(make):
    router = learn(make(), [0, 1], [2, 3])
    query, _ = images([0, 1, 2, 3], seed=5)
    assert router(query).selection.tolist() == [router(row[None]).selection.item() for row in query]


@pytest.mark.parametrize("maker", MAKERS[:2], ids=["class_means", "gaussian"])  # the penalty is the last task's
def test_the_order_of_tasks_does_not_matter(maker):
    query, _ = images([0, 1, 2, 3], seed=5)
    there, back = learn(maker(WIDTH), [0, 1], [2, 3]), maker(WIDTH)
    for classes in ([2, 3], [0, 1]):
        back.learn(*images(classes, seed=sum(classes) + (classes == [2, 3])))
    torch.testing.assert_close(of_classes(there, query), of_classes(back, query), atol=1e-3, rtol=1e-4)


def test_a_merged_router_is_the_one_that_learnt_everything(make):
    query, _ = images([0, 1, 2, 3], seed=5)
    whole, half, other = learn(make(), [0, 1], [2, 3]), learn(make(), [0, 1]), make()
    features, labels = images([2, 3], seed=1 + 5)
    other.learn(features, labels - 2)  # over there it is another number
    half.merge(other, [2, 3])
    assert half(query).selection.tolist() == whole(query).selection.tolist()
    torch.testing.assert_close(of_classes(half, query), of_classes(whole, query), atol=1e-4, rtol=1e-4)


def test_what_is_saved_comes_back_as_it_was(make):
    query, _ = images([0, 1, 2, 3], seed=5)
    router, loaded = learn(make(), [0, 1], [2, 3]), make()
    loaded.load(router.state_dict(), num_tasks=2, num_classes=4)
    assert torch.equal(loaded(query).scores, router(query).scores)


@pytest.mark.parametrize(
    "name, change",
    [
        ("owners", lambda t: t + 1),
        ("classes", lambda t: t * 0),
        ("counts", lambda t: t * 0),
        ("prototypes", lambda t: t[:, :-1]),
        ("prototypes", lambda t: t.double()),
    ],
)
def test_what_does_not_fit_is_not_loaded(make, name, change):
    tensors = learn(make(), [0, 1], [2, 3]).state_dict()
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError):
        make().load(tensors, num_tasks=2, num_classes=4)


def test_a_class_of_two_tasks_is_one_class(make):
    router = learn(make(), [0, 1], [0, 1])
    assert of_classes(router, images([0, 1])[0]).shape[1] == 2


def test_one_image_of_each_class_is_enough_to_begin_with(make):
    router = make()
    router.learn(*images([0, 1], count=1))
    assert router(images([0, 1], seed=3)[0]).scores.isfinite().all()


def test_shrinkage_is_that_of_scikit_learn():
    from sklearn.covariance import oas

    rows = np.random.default_rng(0).normal(size=(40, WIDTH)) * np.linspace(0.1, 3, WIDTH)
    wanted, _ = oas(rows, assume_centered=True)
    found = shrink(torch.from_numpy(rows.T @ rows / len(rows)), freedom=len(rows))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)


def test_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge

    router = learn(RidgeRouter(WIDTH, projection_size=40), [0, 1], [2])
    assert router.penalty.item() in np.float32(RIDGES)
    features = torch.cat([images([0, 1], seed=1)[0], images([2], seed=3)[0]])
    targets = torch.eye(3)[torch.arange(3).repeat_interleave(30)]
    ridge = Ridge(alpha=router.penalty.item(), fit_intercept=False)
    ridge.fit(torch.relu(features @ router.projection).double(), targets)
    query = images([0, 1, 2], seed=9)[0]
    wanted = ridge.predict(torch.relu(query @ router.projection).double())
    np.testing.assert_allclose(router(query).scores, wanted, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_of_the_gram_matrix_is_not_fitted(seed, monkeypatch):
    monkeypatch.setattr("hf_clpeft.routing.ridge.choose_penalty", lambda features, targets: 1e-8)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, 32, generator=generator)
    numbers = torch.arange(2).repeat(100)
    features = 10 * (centres[numbers] + 0.3 * torch.randn(200, 32, generator=generator))
    router = RidgeRouter(query_size=32, projection_size=1000)
    router.learn(features[:100], numbers[:100])
    assert (router.class_scores(router.scores(features[100:])).argmax(dim=1) == numbers[100:]).float().mean() > 0.95


def test_log_sum_exp_is_that_of_torch():
    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    found = log_sum_exp(scores, torch.tensor([1, 0, 1, 1, 2, 0]), count=3)
    wanted = [scores[:, columns].logsumexp(dim=1) for columns in ([1, 5], [0, 2, 3], [4])]
    torch.testing.assert_close(found, torch.stack(wanted, dim=1))


def test_experts_add_to_what_the_router_says_of_their_own_classes_alone():
    # Class 0 is known to tasks 0 and 1, class 1 to task 0, class 2 to task 2, which judges nothing here.
    owners, classes = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 2])
    scores, selection = torch.tensor([[-3.0, -1.0, -2.0, -0.5]]), torch.tensor([[1, 0]])
    logits = torch.tensor([[[1.0, 7.0, 9.0], [2.0, 3.0, 9.0]]])  # of a shared head, which has a say about everything
    found = mix(logits, selection, scores, owners, classes)
    of_first = torch.tensor([2.0, 3.0]).log_softmax(dim=0)  # of classes 0 and 1; task 1 knows one class, and is sure
    zero = torch.logsumexp(
        torch.stack([torch.tensor(ROUTER_WEIGHT * -2.0), of_first[0] + ROUTER_WEIGHT * -3.0]), dim=0
    )
    torch.testing.assert_close(found, torch.tensor([[zero, of_first[1] + ROUTER_WEIGHT * -1.0, -torch.inf]]))
    shifted = logits + torch.tensor([5.0, -7.0])[None, :, None]  # experts that never met have no common scale
    torch.testing.assert_close(mix(shifted, selection, scores, owners, classes), found)


def test_a_model_says_which_statistics_do_not_fit(tmp_path):
    from conftest import make_trainer, pattern_dataset, vouch
    from safetensors.torch import load_file, save_file

    from hf_clpeft import TaskStream, slda

    make_trainer(slda(), tmp_path).learn_stream(TaskStream.class_incremental(pattern_dataset(), num_tasks=2))
    sums = tmp_path / "sums" / "task-000.safetensors"
    tensors = load_file(sums)
    tensors["prototypes"] = tensors["prototypes"][:, :5].clone()
    save_file(tensors, sums)
    vouch(tmp_path)
    with pytest.raises(ConfigError, match="router.safetensors does not fit the model: .*Expected size 5 but got size"):
        ContinualModel.from_pretrained(tmp_path)
