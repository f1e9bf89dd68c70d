"""Classes of a few images beside classes of many."""

import copy

import pytest
import torch

from hf_clpeft.routing import GaussianRouter, KldaRouter


WIDTH, OLD = 60, 12
FRAME = torch.randn(OLD + 10, WIDTH, generator=torch.Generator().manual_seed(1))
SCALES = torch.cat([torch.full((10,), 1.0), torch.full((WIDTH - 10,), 0.2)])


def images(number, count, seed):
    """Of a class: wide in ten directions if it is old, in others if it is new, as photos of new things are.

    A few are noisier than the others.
    """
    generator = torch.Generator().manual_seed(100 * seed + number)
    noise = torch.randn(count, WIDTH, generator=generator)
    noise = noise * (0.7 + 1.3 * (torch.rand(count, 1, generator=generator) < 0.15))
    return 0.2 * FRAME[number] + noise * (SCALES if number < OLD else SCALES.flip(0))


def learnt(kind=GaussianRouter, **options):
    router = kind(WIDTH, **options)
    router.measures = False
    for task in range(3):
        numbers = [4 * task + i for i in range(4)]
        router.learn(torch.cat([images(n, 50, 0) for n in numbers]), torch.tensor(numbers).repeat_interleave(50))
    return router


def taught(router, number=OLD, few=True, label=OLD):
    router = copy.deepcopy(router)
    router.learns_few = few
    router.learn(images(number, 5, 0), torch.full((5,), label))
    return router


@pytest.mark.parametrize("rank", [None, 20])
@pytest.mark.parametrize("width", [WIDTH, 500])  # of 588 degrees of freedom
def test_a_class_of_five_images_wins_its_own_and_takes_few_of_others(width, rank):
    generator = torch.Generator().manual_seed(0)

    def seen(number, count, seed):
        return torch.cat(
            [images(number, count, seed), 0.1 * torch.randn(count, width - WIDTH, generator=generator)], 1
        )

    def lesson(number, few):
        router = copy.deepcopy(old)
        router.learns_few = few
        router.learn(seen(number, 5, 0), torch.full((5,), OLD))
        return router

    old, found, plain, taken = GaussianRouter(width, rank), [], [], []
    old.measures = False
    for task in range(3):
        numbers = [4 * task + i for i in range(4)]
        old.learn(torch.cat([seen(n, 50, 0) for n in numbers]), torch.tensor(numbers).repeat_interleave(50))
    others = torch.cat([seen(number, 100, 9) for number in range(OLD)])
    for number in range(OLD, OLD + 10):
        new = seen(number, 50, 9)
        favoured = lesson(number, few=True)
        found.append((favoured(new).selection == 3).double().mean())
        plain.append((lesson(number, few=False)(new).selection == 3).double().mean())
        taken.append((favoured(others).selection == 3).double().mean())
    assert torch.stack(found).mean() > max(0.6, torch.stack(plain).mean() + 0.15)
    assert torch.stack(taken).mean() < 0.02  # one percent is what is allowed


def test_a_lesson_leaves_the_scores_of_other_classes_as_they_are():
    old, query = learnt(), torch.cat([images(n, 20, 5) for n in (0, 9, OLD)])
    new = taught(taught(old), OLD + 1, label=OLD + 1)
    assert torch.equal(new(query).scores[:, :-2], old(query).scores)
    again = GaussianRouter(WIDTH)
    tasks = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12], [13]]
    again.load(again.join(*new.split(tasks), tasks), 5, 14)
    assert torch.equal(again(query).scores, new(query).scores)


def test_what_is_learnt_first_from_a_few_images_gives_way_to_what_is_learnt_from_many():
    """Their images make up the covariance as long as there are no others, and no longer."""
    first = GaussianRouter(WIDTH)
    first.measures = False
    first = taught(first, 0, label=0)
    assert first(images(0, 20, 5)).scores.isfinite().all() and first._bonus is None
    both = taught(first, 1, few=False, label=1)
    alone = GaussianRouter(WIDTH)
    alone.measures = False
    alone.learn(images(1, 5, 0), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(both.sum_up(), alone.sum_up())


def test_many_lessons_take_little_more_of_old_classes_than_one():
    router, found = learnt(), []
    for number in range(OLD, OLD + 10):
        router = taught(router, number, label=number)
    for number in range(OLD, OLD + 10):
        found.append((router(images(number, 50, 9)).selection == 3 + number - OLD).double().mean())
    others = torch.cat([images(number, 100, 9) for number in range(OLD)])
    assert torch.stack(found).mean() > 0.65
    assert (router(others).selection >= 3).double().mean() < 0.005


def test_a_class_of_one_image_takes_no_bonus_from_others():
    router = learnt()
    router.learn(images(OLD, 1, 0), torch.tensor([OLD]))  # as one that is well known
    for number in range(OLD + 1, OLD + 6):
        router = taught(router, number, label=number)
    assert float(router._bonus[-5:].min()) > 3


@pytest.mark.parametrize("kind, options", [(GaussianRouter, {}), (KldaRouter, {"kernel_features": 60})])
def test_it_is_as_if_a_removed_task_had_never_been(kind, options):
    router = taught(learnt(kind, **options))
    assert float(router._bonus[:-1].abs().max()) == 0
    without = kind(WIDTH, **options)
    without.measures = False
    for task in (0, 2):
        numbers = [4 * task + i for i in range(4)]
        data = torch.cat([images(n, 50, 0) for n in numbers])
        without.learn(data, torch.tensor([n if n < 4 else n - 4 for n in numbers]).repeat_interleave(50))
    without.learns_few = True
    without.learn(images(OLD, 5, 0), torch.full((5,), 8))
    router.remove(1, {n: n if n < 4 else n - 4 for n in range(OLD + 1) if n not in (4, 5, 6, 7)})
    query = torch.cat([images(n, 20, 5) for n in (0, 9, OLD)])
    assert torch.equal(router(query).scores, without(query).scores)


def test_it_is_saved_with_its_task_and_other_files_stay_as_they_were():
    tasks = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    router = taught(learnt())
    shared, parts = router.split(tasks)
    assert ["few" in part for part in parts] == [False, False, False, True]
    again = GaussianRouter(WIDTH)
    again.load(again.join(shared, parts, tasks), 4, 13)
    query = torch.cat([images(n, 20, 5) for n in (0, 9, OLD)])
    assert torch.equal(again(query).scores, router(query).scores)
    parts[3]["few"] = torch.tensor([2])
    with pytest.raises(ValueError, match="few is not 0 or 1"):
        again.load(again.join(shared, parts, tasks), 4, 13)


def test_merged_routers_favour_the_same_classes():
    one, two = learnt(), GaussianRouter(WIDTH)
    two.measures = False
    two.learns_few = True
    two.learn(images(OLD, 5, 0), torch.zeros(5, dtype=torch.int64))
    one.merge(two, [OLD])
    query = torch.cat([images(n, 20, 5) for n in (0, 9, OLD)])
    assert torch.allclose(one(query).scores, taught(learnt())(query).scores, atol=1e-4)
