"""Experts that do not depend on each other are trained by as many processes as there are."""

import pytest
from conftest import OnStep, make_trainer, outcome, pattern_dataset

from hf_clpeft import ConfigError, ContinualTrainingArguments, TaskStream, l2l, s_lora, s_prompts
from hf_clpeft.training.parallel import ParallelExperts


pytestmark = pytest.mark.usefixtures("shallow")
OPTIONS = {"augmentation": "crop_flip", "train_batch_size": 5}


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(num_classes=6), num_tasks=3)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}], ids=str)
def test_trained_alone_and_taken_up_in_order_a_model_is_the_same(options, stream, tmp_path, other_precision):
    for folder, parallel in (("sequence", False), ("parallel", True)):
        trainer = make_trainer(s_lora(k=2), tmp_path / folder, task_parallel=parallel, **OPTIONS, **options)
        report = trainer.learn_stream(stream)
        assert all(parts["train"] > 0 for parts in report.seconds)
    assert outcome(tmp_path / "parallel") == outcome(tmp_path / "sequence")
    assert not (tmp_path / "parallel" / ".parallel").exists()


def test_a_killed_run_trains_no_expert_twice(stream, tmp_path):
    make_trainer(s_prompts(prompt_length=2, k=2), tmp_path / "whole", **OPTIONS).learn_stream(stream)
    options = {**OPTIONS, "task_parallel": True, "resume_from_checkpoint": "auto"}
    steps = []

    def die(done, total):
        steps.append((done, total))
        if len(steps) == total + 2:  # inside the second task
            raise RuntimeError("killed")

    trainer = make_trainer(s_prompts(prompt_length=2, k=2), tmp_path / "killed", **options, callbacks=[OnStep(die)])
    with pytest.raises(RuntimeError, match="killed"):
        trainer.learn_stream(stream)
    again, total = [], steps[0][1]
    trainer = make_trainer(
        s_prompts(prompt_length=2, k=2),
        tmp_path / "killed",
        **options,
        callbacks=[OnStep(lambda done, total: again.append(done))],
    )
    trainer.learn_stream(stream)
    assert len(again) == 2 * total
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_processes_share_tasks_out(stream, tmp_path):
    model = make_trainer(s_lora(), tmp_path).model
    shares = [
        ParallelExperts(tmp_path, model, ContinualTrainingArguments(), {}).todo(stream, rank, 2) for rank in range(2)
    ]
    assert [[(position, task.name) for position, task in share] for share in shares] == [
        [(0, "task-000"), (2, "task-002")],
        [(1, "task-001")],
    ]


@pytest.mark.parametrize(
    "method, message",
    [(l2l(), "needs an expert per task and masked logits; l2l has not"), (s_lora(head="shared"), "share classes")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_experts_that_depend_on_each_other_are_refused(method, message, tmp_path):
    domains = pattern_dataset(domains=["plain", "negative"])
    trainer = make_trainer(method, tmp_path, task_parallel=True)
    with pytest.raises(ConfigError, match=message):
        trainer.learn_stream(TaskStream.domain_incremental(domains, domains=["plain", "negative"]))
