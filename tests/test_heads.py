"""Shared and per-task linear heads."""

import pytest
import torch

from hf_clpeft import Heads
from hf_clpeft.config import TaskConfig


def layer(rows, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(4, rows)


FEATURES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_a_shared_head_judges_every_image_over_all_classes():
    heads, first, second = Heads(4, shared=True), layer(2, 1), layer(2, 2)
    heads.write(first.weight, first.bias, [0, 1])
    heads.write(second.weight, second.bias, [2, 3])
    logits = heads(FEATURES, torch.tensor([0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(logits, torch.cat([first(FEATURES), second(FEATURES)], dim=1))


def test_the_row_of_a_single_class_judges_only_who_went_there():
    heads, first, second = Heads(4, shared=True), layer(2, 1), layer(1, 2)
    heads.write(first.weight, first.bias, [0, 1])
    before = heads(FEATURES, torch.zeros(6, dtype=int))
    heads.write(second.weight, second.bias, [1], single=True)  # of a known class: its old row stays
    logits = heads(FEATURES, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert torch.equal(logits[::2], before[::2])
    torch.testing.assert_close(logits[1::2, 1:], second(FEATURES[1::2]))
    assert (logits[1::2, 0] == -torch.inf).all()


def test_a_head_per_task_judges_only_over_its_own_classes():
    heads, first, second = Heads(4, shared=False), layer(2, 1), layer(3, 2)
    heads.write(first.weight, first.bias, [0, 1])
    heads.write(second.weight, second.bias, [2, 0, 3])
    logits = heads(FEATURES, torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(logits[:3, :2], first(FEATURES[:3]))
    torch.testing.assert_close(logits[3:, [2, 0, 3]], second(FEATURES[3:]))
    assert (logits[:3, 2:] == -torch.inf).all() and (logits[3:, 1] == -torch.inf).all()


@pytest.mark.parametrize("shared", [True, False])
def test_writing_new_rows_leaves_old_ones_bit_identical(shared):
    heads, first = Heads(4, shared), layer(2, 1)
    heads.write(first.weight, first.bias, [0, 1])
    before = heads(FEATURES, torch.zeros(6, dtype=int))
    new = layer(2, 2)
    heads.write(new.weight, new.bias, [2, 3])
    assert torch.equal(heads(FEATURES, torch.zeros(6, dtype=int))[:, :2], before)


def test_known_classes_go_on_where_they_were_and_new_ones_start_at_zero():
    heads, first = Heads(4, shared=True), layer(2, 1)
    heads.write(first.weight, first.bias, [0, 1])
    start = heads.start([1, 2])
    assert torch.equal(start.weight[0], first.weight[1]) and not start.weight[1].any()
    heads.write(start.weight, start.bias, [1, 2])
    assert heads.num_classes == 3
    torch.testing.assert_close(heads(FEATURES, torch.zeros(6, dtype=int))[:, :2], first(FEATURES))


def test_rows_that_were_saved_by_task_are_read_as_those_that_are_saved_together():
    heads, tasks = Heads(4, shared=False), [TaskConfig("b", ["0", "1"]), TaskConfig("a", ["0", "2", "1"])]
    heads.write(*layer(2, 1).parameters(), [0, 1])
    heads.write(*layer(3, 2).parameters(), [0, 2, 1])
    parts = {"weight": heads.weights, "bias": heads.biases, "classes": map(torch.tensor, heads.classes)}
    paired = {part: zip(tasks, rows, strict=True) for part, rows in parts.items()}
    by_task = {f"{task.name}.{part}": rows for part, of_tasks in paired.items() for task, rows in of_tasks}
    for tensors in (by_task, heads.to_tensors()):
        loaded = Heads(4, shared=False)
        loaded.load(tensors, tasks, num_classes=3)
        assert loaded.classes == heads.classes and torch.equal(loaded.bias, heads.bias)
        assert torch.equal(loaded.weight, heads.weight)
