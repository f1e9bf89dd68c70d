"""Every formula against a matrix worked out by hand."""

import math

import evaluate
import pytest

from hf_clpeft import metrics


#        after task 0, 1, 2; rows are what is known after each task
MATRIX = [
    [0.80, 0.30, 0.10],
    [0.90, 0.60, 0.20],
    [0.50, 0.70, 0.40],
]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert metrics.average_accuracy(MATRIX) == pytest.approx((0.5 + 0.7 + 0.4) / 3)


def test_average_incremental_accuracy_leaves_unseen_tasks_out():
    assert metrics.average_incremental_accuracy(MATRIX) == pytest.approx((0.8 + (0.9 + 0.6) / 2 + 1.6 / 3) / 3)


def test_forgetting_counts_from_the_best_and_only_until_the_last_row():
    # task 0 was best after task 1 (0.90), task 1 had only its own row (0.60) and got better
    assert metrics.forgetting(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.6 - 0.7)) / 2)


def test_forgetting_ignores_accuracy_before_a_task_was_learnt():
    assert metrics.forgetting([[0.5, 0.9], [0.5, 0.1]]) == pytest.approx(0.0)


def test_backward_transfer_uses_every_task_but_the_last():
    assert metrics.backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)


def test_forward_transfer_compares_with_an_untrained_model_per_task():
    assert metrics.forward_transfer(MATRIX, [0.5, 0.1, 0.2]) == pytest.approx(((0.3 - 0.1) + (0.2 - 0.2)) / 2)


def test_one_task_forgets_nothing():
    assert metrics.summarize([[0.7]], untrained=0.5) == {
        "average_accuracy": 0.7,
        "average_incremental_accuracy": 0.7,
        "forgetting": 0.0,
        "backward_transfer": 0.0,
        "forward_transfer": 0.0,
    }


def test_unmeasured_entries_never_turn_into_numbers():
    nan = math.nan
    summary = metrics.summarize([[0.8, nan], [nan, 0.6]], untrained=0.5)
    assert summary["average_incremental_accuracy"] is not None
    assert math.isnan(summary["average_accuracy"]) and math.isnan(summary["forward_transfer"])


def test_routing_accuracy_weighs_images_not_tasks():
    assert metrics.routing_accuracy([[9, 1], [0, 90]]) == pytest.approx(0.99)


def test_routing_accuracy_of_a_model_that_went_on_learning_counts_images_lost_to_old_experts():
    assert metrics.routing_accuracy([[0, 0, 0], [3, 7, 0], [0, 5, 5]]) == pytest.approx((7 + 5) / 20)


@pytest.mark.parametrize("matrix", [[[0.5, 0.5]], [], [0.5]])
def test_other_shapes_are_refused(matrix):
    with pytest.raises(ValueError, match="square"):
        metrics.average_accuracy(matrix)


def test_the_evaluate_module_gives_the_same_numbers():
    module = evaluate.load(metrics.EVALUATE_MODULE)
    assert module.compute(predictions=MATRIX, references=[0.5, 0.1, 0.2]) == pytest.approx(
        metrics.summarize(MATRIX, [0.5, 0.1, 0.2])
    )
