"""Tasks of a few images beside prototypes of many."""

import copy

import pytest
import torch
from test_few import OLD, WIDTH, images

from hf_clpeft.routing import PrototypeRouter


TASKS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
QUERY = torch.cat([images(number, 20, 5) for number in (0, 9, OLD)])


def learnt(tasks=(0, 1, 2)):
    router = PrototypeRouter(WIDTH, k=10)
    for task in tasks:
        router.learn(torch.cat([images(number, 50, 0) for number in TASKS[task]]))
    return router


def taught(router, number=OLD, few=True):
    router = copy.deepcopy(router)
    router.learns_few = few
    router.learn(images(number, 5, 0), torch.zeros(5, dtype=torch.int64))
    return router


def test_a_class_of_five_images_wins_its_own_and_takes_few_of_others():
    old, found, plain, taken = learnt(), [], [], []
    others = torch.cat([images(number, 100, 9) for number in range(OLD)])
    for number in range(OLD, OLD + 10):
        new, favoured = images(number, 50, 9), taught(old, number)
        found.append((favoured(new).selection == 3).double().mean())
        plain.append((taught(old, number, few=False)(new).selection == 3).double().mean())
        taken.append((favoured(others).selection == 3).double().mean())
        assert torch.equal(favoured(others).distances[:, :3], old(others).distances)
    assert torch.stack(found).mean() > 0.75 > 0.7 > torch.stack(plain).mean()
    assert torch.stack(taken).mean() < 0.01


def test_all_classes_of_few_images_share_what_they_may_take():
    one, two = taught(learnt()), taught(taught(learnt()), OLD + 1)
    assert 0 < float(two._bonus[-2]) < float(one._bonus[-1])


def test_classes_of_a_lesson_have_a_prototype_each():
    router = learnt()
    router.learns_few = True
    router.learn(torch.cat([images(OLD, 5, 0), images(OLD + 1, 5, 0)]), torch.tensor([0, 1]).repeat_interleave(5))
    assert router.owners.tolist()[30:] == [3, 3] and router.few.tolist() == 30 * [0] + [1, 1]


def test_it_is_as_if_a_removed_task_had_never_been():
    router = taught(learnt())
    router.remove(1, {})
    assert torch.equal(router(QUERY).distances, taught(learnt((0, 2)))(QUERY).distances)
    router.remove(2, {})
    assert router._metric is None and torch.equal(router(QUERY).distances, learnt((0, 2))(QUERY).distances)


def test_it_is_saved_and_files_without_few_images_stay_as_they_were():
    assert learnt().split(TASKS[:3])[0].keys() == {"prototypes", "owners", "thresholds"}
    router, again = taught(learnt()), PrototypeRouter(WIDTH)
    state, parts = router.split(TASKS)
    again.load(again.join(state, parts, TASKS), 4, 13)
    assert torch.equal(again(QUERY).distances, router(QUERY).distances)
    with pytest.raises(ValueError, match="few is not 0 or 1"):
        again.load(again.join({**state, "few": state["few"] + 1}, parts, TASKS), 4, 13)


def test_a_file_from_before_thresholds_can_be_taught():
    state = {name: tensor for name, tensor in learnt().split(TASKS[:3])[0].items() if name != "thresholds"}
    router = PrototypeRouter(WIDTH)
    router.load(router.join(state, [], TASKS[:3]), 3, 12)
    assert torch.isfinite(taught(router)(QUERY).distances).all()


def test_merged_routers_favour_the_same_tasks():
    one, two = learnt(), taught(PrototypeRouter(WIDTH))
    one.merge(two, [OLD])
    assert torch.equal(one(QUERY).distances, taught(learnt())(QUERY).distances)


def test_an_image_goes_where_it_would_go_alone():
    router = taught(learnt())
    alone = torch.cat([router(one[None]).distances for one in QUERY])
    assert torch.allclose(router(QUERY).distances, alone, atol=1e-6)
