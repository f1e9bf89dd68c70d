"""What a user may hook into training: when it is called and with what, and what is left if it raises."""

import json
import math

import pytest
import torch
from conftest import make_trainer, outcome, pattern_dataset

from hf_clpeft import ContinualModel, TaskStream, TrainerCallback, l2l, s_lora, s_x, sequential_lora, slda


pytestmark = pytest.mark.usefixtures("shallow")
REPO = "alice/model"
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
OPTIONS = {"num_train_epochs": 1, "logging_steps": 2}  # two steps a task


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(), num_tasks=2)


class Noting(TrainerCallback):
    """Notes every event; `check` looks at the model and all arguments when it happens."""

    def __init__(self, check=lambda event, model, *args: None):
        self.events, self.check = [], check

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)

        def note(model, *args):
            self.events.append((name, *args))
            self.check(name, model, *args)

        return note


def test_every_event_happens_in_its_place_and_says_what_it_is_about(stream, hub, tmp_path):
    states = []

    def check(event, model, *args):
        assert model is trainer.model
        states.append((event, len(model.config.tasks), model.method.task and model.method.task.name))
        if event == "on_evaluate":
            assert not math.isnan(model.report.accuracy_matrix[-1][0])
        if event in ("on_save", "on_push"):
            assert len(ContinualModel.from_pretrained(args[0]).config.tasks) == len(model.config.tasks)

    noting, second = Noting(check), Noting()
    push = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": "hf_alice"}
    trainer = make_trainer(s_lora(k=1), tmp_path, callbacks=[noting, second], **OPTIONS, **push)
    report = trainer.learn_stream(stream)
    assert noting.events == second.events
    logs = [event for event in noting.events if event[0] == "on_log"]
    assert [(list(values), step) for _, values, step in logs[::2]] == [(["train/loss"], 2), (["train/loss"], 4)]
    assert logs[3] == ("on_log", {f"eval/{name}": value for name, value in report.summary().items()}, 4)
    expected = [
        [
            ("on_task_begin", task),
            ("on_step_end", 1, 2),
            ("on_step_end", 2, 2),
            logs[2 * position],
            logs[2 * position + 1],
            ("on_evaluate",),
            ("on_task_end", task),
            ("on_save", str(tmp_path)),
            ("on_push", REPO, 0),
        ]
        for position, task in enumerate(stream)
    ]
    assert noting.events == [event for events in expected for event in events]
    learning = {("on_task_begin", 0, None), ("on_step_end", 0, "task-000"), ("on_log", 0, "task-000")}
    done = {(event, 1, None) for event in ("on_log", "on_evaluate", "on_task_end", "on_save", "on_push")}
    assert set(states[:9]) == learning | done
    assert set(EVENTS) == {event for event, *_ in noting.events}


def test_what_does_not_train_makes_no_steps(stream, tmp_path):
    noting = Noting()
    make_trainer(slda(), tmp_path, callbacks=[noting], **OPTIONS).learn(stream[0])
    events = ["on_task_begin", "on_log", "on_evaluate", "on_task_end", "on_save"]
    assert [event for event, *_ in noting.events] == events


def state_of(trainer):
    model = trainer.model
    with torch.no_grad():
        logits = model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    tensors = {name: tensor.tolist() for name, tensor in model.method.state_dict().items()}
    texts = json.dumps([model.config.to_dict(), model.report.to_dict()])
    return logits.tolist(), flags, tensors, texts, model.bank.names


METHODS = {
    "s_lora": (s_lora(k=2), EVENTS),
    "ia3": (s_x(peft={"peft_type": "IA3", "feedforward_modules": []}, k=2), ["on_step_end", "on_task_end"]),
    "l2l": (l2l(pool_size=4, top_n=2), ["on_step_end", "on_task_end"]),
    "sequential_lora": (sequential_lora(), ["on_step_end", "on_task_end"]),
    "slda": (slda(), ["on_task_end"]),
}


@pytest.fixture(scope="module")
def undisturbed(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, (method, _) in METHODS.items():
        make_trainer(method, folder / name, **OPTIONS).learn_stream(stream)
    return {name: outcome(folder / name) for name in METHODS}


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("name, event", [(name, event) for name, (_, events) in METHODS.items() for event in events])
def test_what_a_callback_raises_leaves_all_as_it_was(name, event, task, stream, undisturbed, hub, tmp_path):
    failing = []

    def check(happened, model, *args):
        if failing and happened == event:
            raise RuntimeError(f"as planned, {event}")

    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": "hf_alice"} if event == "on_push" else {}
    trainer = make_trainer(METHODS[name][0], tmp_path / "out", callbacks=[Noting(check)], **OPTIONS, **options)
    if task:
        trainer.learn(stream[0])
        before, files = state_of(trainer), outcome(tmp_path / "out")
    failing.append(event)
    with pytest.raises(RuntimeError, match=f"as planned, {event}"):
        trainer.learn(stream[task])
    failing.clear()
    saved = event in ("on_save", "on_push")
    assert len(trainer.model.config.tasks) == len(trainer.report.tasks) == task + saved
    assert trainer.model.bank.slot is None and trainer.model.method.task is None
    if saved:
        assert len(ContinualModel.from_pretrained(tmp_path / "out").config.tasks) == task + 1
    elif task:
        assert state_of(trainer) == before and outcome(tmp_path / "out") == files
    else:
        assert not (tmp_path / "out" / "config.json").exists()
    for later in list(stream)[task + saved :]:
        trainer.learn(later)
    assert outcome(tmp_path / "out") == undisturbed[name]


@pytest.mark.parametrize("callback", [TrainerCallback, print, None], ids=["class", "function", "nothing"])
def test_what_is_no_callback_is_refused_at_once(callback, tmp_path):
    with pytest.raises(TypeError, match="give objects of subclasses of TrainerCallback"):
        make_trainer(s_lora(), tmp_path, callbacks=[TrainerCallback(), callback])
