"""The models of a running demo: many visitors, many models, and how each of them was before."""

import shutil
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
import torch
from conftest import EXAMPLES, SEVEN, make_trainer, pattern_dataset
from gradio_client import Client, handle_file
from huggingface_hub import HfApi
from PIL import Image

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    TaskStream,
    s_lora,
)
from hf_clpeft.demo.batching import Batcher
from hf_clpeft.demo.handlers import Handlers
from hf_clpeft.demo.models import Models
from hf_clpeft.streams import PictureError


def test_no_request_ends_the_batching_thread(digits):
    batcher, image = Batcher(), Image.open(SEVEN)
    for options in ({"expert": ["task-000"]}, {"expert": {}}, {"top_k": 0}, {"reject_rate": "0.1"}):
        with pytest.raises(ConfigError, match="|".join(options)):
            batcher.predict(digits, [image], **options)
    with pytest.raises(PictureError, match="is of type NoneType"):
        batcher.predict(digits, [None])
    jobs = [(digits, [("expert", [])]), (digits, (("no_option", 1),)), None, 5]
    pixels = digits.backbone.transform.resize([image])
    waiting = [Future() for _ in jobs]
    for job, future in zip(jobs, waiting, strict=True):  # what predict lets nobody ask
        batcher._waiting.put((job, pixels, future))
    for future in waiting:
        with pytest.raises((TypeError, ValueError)):
            future.result(timeout=60)
    with pytest.raises(SystemExit):
        batcher.run(lambda: sys.exit("no"))
    assert batcher.predict(digits, [image])[0].label == "7"


def test_concurrent_visitors_get_their_own_answers(page):
    wrong = []

    def visit(number):
        visitor = Client(page, verbose=False, ssl_verify=False)
        for turn in range(5):
            digit = (7 * number + 3 * turn) % 10
            found = visitor.predict(handle_file(str(EXAMPLES[digit])), "", api_name="/predict")[3]
            if found["label"] != str(digit):
                wrong.append((number, digit, found))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(12)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert not wrong


def test_visitors_with_different_models_and_wishes_share_the_batcher(digits):
    batcher, image = Batcher(), Image.open(SEVEN).convert("RGB")
    (alone,), (other,) = digits.predict(image, top_k=2), digits.predict(image, expert="task-000")
    broken = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    results = {}

    def visit(number):
        try:
            if number % 3 == 0:
                results[number] = batcher.predict(broken, [image])
            else:
                options = {"top_k": 2} if number % 3 == 1 else {"expert": "task-000"}
                results[number] = batcher.predict(digits, [image] * 2, **options)
        except ConfigError as error:
            results[number] = str(error)

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(24)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for number, found in results.items():
        if number % 3 == 0:
            assert "learnt no task yet" in found
        else:
            expected = alone if number % 3 == 1 else other
            assert [(p.label, p.expert, list(p.classes)) for p in found] == [
                (expected.label, expected.expert, list(expected.classes))
            ] * 2


def test_the_past_of_a_model_on_the_hub_comes_from_its_tags(hub):
    stream = TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)
    options = {"push_to_hub": True, "hub_model_id": "alice/model", "hub_token": "hf_alice", "num_train_epochs": 1}
    make_trainer(s_lora(k=1), **options).learn_stream(stream)
    models = Models("alice/model")
    past, pulled = models.after("", 2), ContinualModel.from_pretrained("alice/model", revision="task-001")
    models._tags = []  # as without a network
    without = models._past("", models.served, 2)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pulled(pixels).logits
        assert torch.equal(past(pixels).logits, expected) and torch.equal(without(pixels).logits, expected)
    with pytest.raises(ConfigError, match="none after task 4"):
        models.after("", 4)


def test_a_branch_is_not_shown_with_the_past_of_another(hub):
    first, second, third = TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)
    options = {"push_to_hub": True, "hub_model_id": "alice/model", "hub_token": "hf_alice", "num_train_epochs": 1}
    make_trainer(s_lora(k=1), **options).learn_stream(TaskStream([first, second]))
    HfApi(token="hf_alice").create_branch("alice/model", branch="other", revision=first.name)
    shutil.rmtree("out")
    model = ContinualModel.from_pretrained("alice/model", revision="other")
    trainer = ContinualTrainer(model, ContinualTrainingArguments("out", hub_revision="other", **options))
    trainer.learn(replace(third, name=second.name))
    trainer.learn(replace(second, name=third.name))
    models = Models("alice/model", revision="other")
    assert models.after("", 2).config.tasks == models.served.config.tasks[:2]


def test_models_given_back_take_no_place_from_those_that_were_taught(letters, monkeypatch):
    monkeypatch.setattr("hf_clpeft.demo.models.MOST_MODELS", 2)
    monkeypatch.setattr("hf_clpeft.demo.models.MOST_RETURNED", 2)
    handlers = Handlers(Models("hf-clpeft/s-lora-digits"))
    _, first, archive = handlers.teach("letter A", [str(path) for path in letters[:3]])
    _, second, _ = handlers.teach("letter B", [str(path) for path in letters[:3]])
    _, same = handlers.give_back(archive)
    assert [handlers.give_back(archive)[1] for _ in range(4)] == [same] * 4
    given = [same]
    shutil.unpack_archive(archive, "model")
    for number in range(3):  # any change makes another model of it
        Path("model/config.json").write_text(Path("model/config.json").read_text() + "\n")
        given.append(handlers.give_back(shutil.make_archive(str(number), "zip", "model"))[1])
        handlers.predict(str(SEVEN), given[-1])
    models = handlers.models
    assert len({*given}) == 4 and [models.has(key) for key in [first, second, *given]] == [1, 1, 0, 0, 1, 1]
    assert sum(models.folder(key).is_dir() for key in [first, second, *given[2:]]) == 4
    assert len(list(Path(models._home.name).glob("*/model/config.json"))) == 4
    with pytest.raises(gr.Error, match="is not here any more: upload its download"):
        handlers.predict(str(SEVEN), same)
    assert handlers.give_back(archive)[1] not in given  # and it is there again
    _, third, _ = handlers.teach("letter C", [str(path) for path in letters[:3]])
    assert [models.has(key) for key in (first, second, third)] == [False, True, True]
