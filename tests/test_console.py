"""What a run says before it begins, after every task, and at the end."""

from dataclasses import fields

import pytest
from conftest import make_trainer, pattern_dataset, pattern_rows
from datasets import Dataset, DatasetDict, IterableDatasetDict

from hf_clpeft import (
    METHODS,
    TaskStream,
    TrainerCallback,
    l2l,
    ncm,
    ranpac_first,
    run_recipe,
    s_lora,
    sequential_lora,
)
from hf_clpeft.reports.tables import print_table
from hf_clpeft.training import progress
from hf_clpeft.training.plan import make_plan
from hf_clpeft.training.recipe import resuming_command


pytestmark = pytest.mark.usefixtures("shallow")
OPTIONS = {"num_train_epochs": 3, "train_batch_size": 5, "gradient_accumulation_steps": 2}


class Steps(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, trainer, step, num_steps):
        self.seen.append(step)


PLANNED = [s_lora(k=1), l2l(pool_size=3, top_n=2), ncm(), ranpac_first(projection_size=20), sequential_lora()]


@pytest.mark.parametrize("method", PLANNED, ids=lambda method: method.name)
def test_a_plan_is_what_comes(method):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    stream = stream.joined() if method.name == "sequential_lora" else stream
    planned = make_plan(make_trainer(method).model, stream, make_trainer(method, **OPTIONS).args)
    trainer, steps = make_trainer(method, **OPTIONS), Steps()
    trainer.callbacks.callbacks.append(steps)
    report = trainer.learn_stream(stream)
    assert sum(task.steps for task in planned) == len(steps.seen)
    assert [task.train_images for task in planned] == [task.num_train_images for task in trainer.model.config.tasks]
    for task, expert, head in zip(planned, report.expert_parameters, report.head_parameters, strict=True):
        assert (task.expert_parameters, task.head_parameters) == (expert, head)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_plan(name):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    kind = METHODS[name].Config
    needed = {"peft": {"peft_type": "LORA", "r": 1}} if "peft" in {field.name for field in fields(kind)} else {}
    trainer = make_trainer(kind(**needed))
    model, args = trainer.model, trainer.args
    assert [task.task.name for task in make_plan(model, stream, args)] == ["task-000", "task-001"]


def test_a_plan_knows_what_is_learnt_already_and_what_only_reading_would_tell():
    stream, trainer = TaskStream.class_incremental(pattern_dataset(), num_tasks=2), make_trainer(s_lora(k=1))
    trainer.learn(stream[0])
    assert [task.learnt for task in make_plan(trainer.model, stream, trainer.args)] == [True, False]
    streamed = IterableDatasetDict({side: rows.to_iterable_dataset() for side, rows in pattern_dataset().items()})
    planned = make_plan(
        make_trainer(s_lora()).model, TaskStream.class_incremental(streamed, num_tasks=2), trainer.args
    )
    assert [(task.train_images, task.steps) for task in planned] == [(None, None)] * 2


def recipe(*options):
    return run_recipe("s_lora", argv=["--k", "1", "--benchmark", "digits", *options])


def test_a_dry_run_prints_the_plan_and_the_command_and_leaves_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["recipes/s_lora.py", "--benchmark", "digits", "--dry_run"])
    assert recipe("--dry_run", "--num_train_epochs", "2") is None
    said = capsys.readouterr().out
    assert "digits: 5 tasks" in said and "4, 5" in said and "92 steps of 32 images" in said
    assert said.strip().endswith("s_lora.py --benchmark digits")
    assert not list(tmp_path.iterdir())


def test_a_run_prints_a_table_after_each_task_and_the_next_command(capsys):
    recipe("--num_tasks", "2", "--num_train_epochs", "1", "--max_train_samples_per_task", "32")
    said = capsys.readouterr().out
    for line in ("task-000 (0, 1, 2, …) is learnt", "task-001 (5, 6, 7, …) is learnt", "all 2 tasks", "this task"):
        assert line in said
    assert "next: hf-clpeft demo out" in said and "hf-clpeft push out ME/NAME" in said


def test_names_of_strangers_are_shown_as_they_are(capsys):
    rows = Dataset.from_dict({"image": pattern_rows(1)["image"], "label": ["[red]cat[/red]", "dog"] * 3})
    trainer = make_trainer(s_lora(k=1), disable_tqdm=False)
    trainer.learn_stream(TaskStream.class_incremental(DatasetDict(train=rows, test=rows), num_tasks=1))
    assert "([red]cat[/red], dog) is learnt" in capsys.readouterr().out
    print_table("[b]", ["name"], [["[link=x]y"]], "[u]")
    said = capsys.readouterr().out
    assert all(text in said for text in ("[b]", "[link=x]y", "[u]"))


def test_the_command_that_goes_on_says_so_once(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/l2l.py", "--output_dir", "my runs"])
    once = resuming_command()
    assert once.startswith("python") and once.endswith(".py --output_dir 'my runs' --resume_from_checkpoint auto")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate launch does
    assert resuming_command().startswith("accelerate launch --quiet recipes/l2l.py --output_dir")
    monkeypatch.setattr("sys.argv", ["recipes/l2l.py", "--resume_from_checkpoint", "auto"])
    assert resuming_command().count("--resume_from_checkpoint") == 1


@pytest.mark.parametrize("every", [0, 30])
def test_a_log_has_lines_of_progress_from_time_to_time_rather_than_bars(every, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", every)
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    trainer = make_trainer(s_lora(k=1), disable_tqdm=False, logging_steps=1, **OPTIONS)
    capsys.readouterr()  # the bar of transformers, which loads weights
    trainer.learn_stream(stream)
    lines = [line for line in capsys.readouterr().err.split("\n") if "Resizing" not in line]
    said = [line for line in lines if "Training task-001 (" in line]
    assert any("100%" in line and "loss=" in line for line in said) if every == 0 else not said
    assert not any("\r" in line or "\x1b" in line for line in lines)
