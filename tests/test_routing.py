"""Prototypes and the nearest of them."""

import pytest
import torch

from hf_clpeft import KeyRouter, PrototypeRouter
from hf_clpeft.routing.prototypes import choose_k


def clusters(*centres, count=20):
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(len(centres), count, len(centres[0]), generator=generator)
    return (torch.tensor(centres)[:, None] + noise).flatten(0, 1)


def learn(router, k, features):
    router.k = k
    router.learn(features)


def test_k_means_finds_the_clusters_of_normalised_features():
    router = PrototypeRouter(3)
    learn(router, 2, clusters([5.0, 0, 0], [0, 9.0, 0]))
    found = router.prototypes[router.prototypes[:, 0].argsort(descending=True)]
    torch.testing.assert_close(found, torch.eye(3)[:2], atol=0.02, rtol=0)


def test_fewer_images_than_prototypes_give_fewer_prototypes():
    router = PrototypeRouter(3)
    learn(router, 5, torch.eye(3)[:2])
    assert len(router.prototypes) == 2


def test_prototypes_belong_to_the_task_that_brought_them():
    router = PrototypeRouter(3)
    learn(router, 2, clusters([1.0, 0, 0], [0, 1.0, 0]))
    learn(router, 1, clusters([0, 0, 1.0]))
    assert router.owners.tolist() == [0, 0, 1]
    assert router(torch.tensor([[0.1, 2.0, 0.0], [0.0, 0.1, 0.3]])).selection.tolist() == [0, 1]


def test_distances_are_to_the_nearest_prototype_of_each_task():
    router = PrototypeRouter(2)
    router.add_prototypes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(100))
    router.add_prototypes(torch.tensor([[-1.0, 0.0]]), torch.zeros(100))
    torch.testing.assert_close(router.distances(torch.tensor([[0.0, 3.0]])), torch.tensor([[0.0, 2**0.5]]))


def test_a_share_of_the_tasks_own_images_as_stated_lies_beyond_a_threshold():
    generator = torch.Generator().manual_seed(0)
    router, centres = PrototypeRouter(16), torch.randn(5, 16, generator=generator)

    def images(count):
        which = torch.randint(0, 5, (count,), generator=generator)
        return centres[which] + 0.3 * torch.randn(count, 16, generator=generator)

    learn(router, 5, images(1000))
    query = images(20_000)
    typicality = router.typicality(query, router.distances(query))
    for rate in (0.01, 0.05, 0.2, 0.5):
        assert (typicality < rate).float().mean().item() == pytest.approx(rate, abs=0.2 * rate + 0.005)
    noise = torch.randn(200, 16, generator=generator)
    assert router.typicality(noise, router.distances(noise)).max() < 0.05


def test_few_images_still_tell_what_is_far():
    generator = torch.Generator().manual_seed(0)
    centre, rejected, trials = torch.randn(16, generator=generator), 0.0, 100
    for _ in range(trials):
        router = PrototypeRouter(16)
        learn(router, 5, centre + 0.3 * torch.randn(5, 16, generator=generator))
        more = centre + 0.3 * torch.randn(50, 16, generator=generator)
        rejected += (router.typicality(more, router.distances(more)) < 0.05).float().mean().item() / trials
        assert router.typicality(-more, router.distances(-more)).max() < 0.05
    assert rejected < 0.08  # stated: 0.05, where distances are normally distributed
    learn(router, 1, torch.ones(1, 16))  # one image says nothing
    assert router.calibrated() == [True, False]


def test_a_route_does_not_depend_on_the_rest_of_the_batch():
    router = PrototypeRouter(8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        learn(router, 5, torch.randn(40, 8, generator=generator))
    query = torch.randn(64, 8, generator=generator)
    together = router(query)
    alone = [router(row[None]) for row in query]
    assert together.selection.tolist() == [routing.selection.item() for routing in alone]
    assert together.distance.tolist() == [routing.distance.item() for routing in alone]


def test_auto_takes_as_many_prototypes_as_there_are_clusters():
    centres = torch.eye(64)[:5].tolist()  # in few dimensions splitting the noise would help
    assert choose_k(clusters(*centres, count=40)) == 5
    assert choose_k(torch.eye(2)) == 1


def test_keys_select_the_nearest_by_cosine_whatever_the_rest_of_the_batch():
    router = KeyRouter(query_size=8, pool_size=10, top_n=3)
    query = 9 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    together = router(query)
    cosines = torch.nn.functional.cosine_similarity(query[:, None], router.keys[None], dim=-1)
    nearest = cosines.topk(3)
    assert torch.equal(together.selection, nearest.indices)
    torch.testing.assert_close(together.distance, 1 - nearest.values.mean(dim=1))
    assert all(
        torch.equal(router(row[None]).selection[0], chosen)
        for row, chosen in zip(query, together.selection, strict=True)
    )


def test_pulling_brings_selected_keys_nearer_and_leaves_the_others():
    router = KeyRouter(query_size=4, pool_size=4, top_n=1)
    router.keys.data = torch.eye(4)
    router.keys.requires_grad_(True)
    query = torch.tensor([[1.0, 0.5, 0.0, 0.0]])
    before = router(query).distance
    before.sum().backward()
    router.keys.data -= router.keys.grad
    assert router(query).distance < before and torch.equal(router.keys.data[1:], torch.eye(4)[1:])
