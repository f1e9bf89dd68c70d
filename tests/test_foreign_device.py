"""As on a GPU: no tensor of another device is mixed in, and no batch makes the CPU wait."""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from conftest import make_trainer, pattern_dataset
from foreign import DEVICE, ForeignDevice
from test_every_method import NAMES, options_of, trainer_on
from test_export import two_layers

from hf_clpeft import ContinualModel, TaskStream
from hf_clpeft.methods import SLora
from hf_clpeft.streams.images import open_image
from hf_clpeft.training import evaluation, features
from hf_clpeft.training.steps import Gradients, StepLoop
from hf_clpeft.training.trunk_cache import TrunkCache


pytestmark = pytest.mark.filterwarnings("ignore:.*to a meta parameter")  # which is none: the copy is done
BATCH = 4


@pytest.fixture(scope="module")
def stream():
    """Two tasks of two classes."""
    return TaskStream.class_incremental(pattern_dataset(4, per_class=4), num_tasks=2)


@pytest.fixture(scope="module")
def tiny(backbone):
    torch.manual_seed(0)  # how often MOS asks further depends on the weights
    return two_layers(backbone)


@contextmanager
def watching(device):
    """Collects what the steps of a task wait for, and what features wait for beyond once per batch."""
    found, run, rest, extract = [], StepLoop.run, StepLoop._save_or_stop, features.extract

    def watched(function, *args, allowed=0):
        before = len(device.waits)
        result = function(*args)
        found.extend(device.waits[before:][allowed:])
        return result

    def at_rest(loop, stop):  # whether to save, and whether the loss is finite, is not asked in every step
        before = len(device.waits)
        rest(loop, stop)
        del device.waits[before:]

    def once_per_batch(images, rows, *args):
        return watched(extract, images, rows, *args, allowed=-(-len(rows) // BATCH))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLoop, "run", lambda *args: watched(run, *args))
        patch.setattr(StepLoop, "_save_or_stop", at_rest)
        for module in (features, evaluation):
            patch.setattr(module, "extract", once_per_batch)
        yield found


def learn(name, stream, device, backbone, expert_layers=None, augmentation="crop_flip", **args):
    """Learns two tasks on the foreign device, and returns what the batches of the second have waited for."""
    sizes = {"train_batch_size": BATCH, "eval_batch_size": BATCH, "logging_steps": 1000}
    options = options_of(name)
    if expert_layers is not None:
        options.expert_layers = expert_layers
    trainer = trainer_on(deepcopy(backbone), options, "out", augmentation=augmentation, **sizes, **args)
    trainer.learn_stream(stream[:1])  # whatever is read once, and not with every batch, is known now
    with watching(device) as waits:
        trainer.learn_stream(stream)
    return trainer.model, waits


def judge(model, device):
    """What the model waits for when it reads a batch for the second time."""
    pixels = torch.randn(BATCH, *model.backbone.input_shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for _ in range(2):
        device.waits.clear()
        with torch.no_grad():
            model(pixels)
    return device.waits


@pytest.mark.parametrize("name", NAMES)
def test_every_method_lives_on_one_device_and_no_batch_makes_it_wait(name, stream, tiny):
    images = [open_image(encoded) for encoded, _, _ in stream[1].test]
    with ForeignDevice().patched() as device:
        model, waits = learn(name, stream, device, tiny)
        assert waits == []
        assert {tensor.device for tensor in model.state_dict().values()} == {DEVICE}
        # MOS asks a further expert only about images whose class is another's, and so must know which.
        assert len(judge(model, device)) <= getattr(model.method.options, "hops", 0), device.waits
        allowed = len(device.waits) + 1 + model.can_reject  # the predictions, and the features that typicality is of
        for _ in range(2):
            device.waits.clear()
            found = model.predict(images)
        assert len(device.waits) <= allowed, device.waits
    for here, there in zip(ContinualModel.from_pretrained("out", backbone=tiny).predict(images), found, strict=True):
        assert (here.label, here.expert) == (there.label, there.expert)
        assert here.score == pytest.approx(there.score, abs=1e-4)
        assert here.typicality == pytest.approx(there.typicality, abs=0.02)


@pytest.mark.parametrize("name", ["s_lora", "s_lora_mix", "slda_pp", "sd_lora"])
def test_experts_in_upper_layers_wait_once_for_what_is_cached(name, stream, tiny, monkeypatch):
    filled, write = [], TrunkCache.write

    def filling(*args):
        before = len(device.waits)
        write(*args)
        filled.append(device.waits[before:])
        del device.waits[before:]

    monkeypatch.setattr(TrunkCache, "write", filling)
    with ForeignDevice().patched() as device:
        model, waits = learn(name, stream, device, tiny, expert_layers=[-1], augmentation="none", num_train_epochs=3)
        assert waits == [] and {tensor.device for tensor in model.state_dict().values()} == {DEVICE}
        assert judge(model, device) == []
    rows = sum(len(split.dataset) for task in stream for split in (task.train, task.test))
    assert filled and all(len(found) == 1 for found in filled) and len(filled) <= rows / BATCH + 4


@pytest.mark.parametrize("name", ["s_lora", "s_prompts"])
def test_tasks_that_are_trained_together_do_not_wait_either(name, stream, monkeypatch):
    waits, call = [], Gradients.__call__

    def watched(*args):
        before = len(device.waits)
        losses = call(*args)
        waits.append(device.waits[before:])
        return losses

    monkeypatch.setattr(Gradients, "__call__", watched)
    with ForeignDevice().patched() as device:
        sizes = {"num_train_epochs": 2, "train_batch_size": BATCH, "eval_batch_size": BATCH}
        trainer = make_trainer(options_of(name), augmentation="crop_flip", **sizes)
        trainer.learn_stream(stream, together=2)
    assert len(waits) == 4 and not any(waits[1:])  # the first pass finds out which layers share inputs


@pytest.mark.parametrize("place", ["loss", "classify", "look", "read"])
def test_a_hidden_copy_to_the_cpu_is_found(place, stream, tiny, monkeypatch):
    known = getattr(SLora, place)

    def copying(self, first, *args):
        first = first._replace(labels=first.labels.cpu().to(DEVICE)) if place == "loss" else first.cpu().to(DEVICE)
        return known(self, first, *args)

    monkeypatch.setattr(SLora, place, copying)
    with ForeignDevice().patched() as device:
        model, waits = learn("s_lora", stream, device, tiny)
        if place == "classify":
            waits = judge(model, device)
    assert any("a copy to the CPU" in wait for wait in waits)


def test_a_tensor_left_on_the_cpu_is_found(stream, tiny, monkeypatch):
    monkeypatch.setattr(SLora, "route", lambda self, query: self.router(query + torch.zeros(query.shape[1])))
    with ForeignDevice().patched() as device, pytest.raises(RuntimeError, match="same device"):
        learn("s_lora", stream, device, tiny)
