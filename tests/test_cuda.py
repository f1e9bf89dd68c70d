"""On a real GPU; skipped without one. Needs no other file: `python -m pytest --noconftest tests/test_cuda.py`."""

from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_clpeft import (
    METHODS,
    ROUTERS,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    load_benchmark,
    s_lora,
)
from hf_clpeft.backbones import precision
from hf_clpeft.export import export_merged
from hf_clpeft.reports import report
from hf_clpeft.streams.images import open_image
from hf_clpeft.training import evaluation, features
from hf_clpeft.training.steps import StepLoop


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda", 0)
BACKBONE = "hf-clpeft/vit-tiny-glyphs"
SMALL = {"k": 2, "projection_size": 40, "kernel_features": 40, "rank": 20, "pool_size": 4, "top_n": 2, "mix": 2}
NAMES = [
    name
    for name, kind in METHODS.items()
    if kind.__module__.startswith("hf_clpeft.") and "peft" not in {f.name for f in fields(kind.Config)}
]


def options_for(kind, options=SMALL):
    return {f.name: options[f.name] for f in fields(kind) if f.name in options}


@contextmanager
def waiting(mode):
    """Context manager: whatever makes the CPU wait for the GPU is an error, or is not."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def watching():
    """Context manager: steps of training and the features of a batch must not wait."""
    run, rest, extract = StepLoop.run, StepLoop._save_or_stop, features.extract

    def within(mode, function, *args):
        with waiting(mode):
            return function(*args)

    def watched(images, rows, features_of, *args):
        return extract(images, rows, partial(within, "error", features_of), *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLoop, "run", lambda *args: within("error", run, *args))
        patch.setattr(StepLoop, "_save_or_stop", lambda *args: within("default", rest, *args))
        for module in (features, evaluation):
            patch.setattr(module, "extract", watched)
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(report, "plot_report", lambda *args: Path(args[4]).touch())


@pytest.fixture(scope="module")
def stream():
    return load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=32)[:2]


def learn(method, stream, folder):
    sizes = {"num_train_epochs": 2, "train_batch_size": 16, "eval_batch_size": 16, "logging_steps": 10**6}
    args = ContinualTrainingArguments(output_dir=str(folder), disable_tqdm=True, **sizes)
    trainer = ContinualTrainer(ContinualModel.from_backbone(BACKBONE, method), args)
    trainer.learn_stream(stream[:1])  # what is read once, and not with every batch, is known now
    with watching():
        trainer.learn_stream(stream)
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_without_waiting_and_answers_as_on_the_cpu(name, stream, tmp_path):
    kind = METHODS[name].Config
    trainer = learn(kind(**options_for(kind)), stream, tmp_path)
    model = trainer.model
    assert {tensor.device for tensor in model.state_dict().values()} == {GPU}
    assert trainer.accelerator.mixed_precision == "bf16"
    pixels = torch.randn(8, *model.backbone.input_shape, device=GPU)
    with torch.no_grad():
        model(pixels)
        # MOS asks a further expert only about images whose class is another's, and so must know which.
        with waiting("default" if name == "mos" else "error"):
            model(pixels)
    torch.set_float32_matmul_precision("highest")
    images = [open_image(encoded) for task in stream for encoded, _, _ in task.test]
    found, expected = model.predict(images), ContinualModel.from_pretrained(tmp_path).predict(images)
    pairs = [*zip(found, expected, strict=True)]
    assert sum(here.label == there.label for here, there in pairs) >= 0.95 * len(pairs)
    near = [abs(here.score - there.score) < 0.01 for here, there in pairs]
    assert sum(near) >= 0.95 * len(pairs)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "keys"])
def test_sums_on_the_gpu_are_those_of_the_cpu(name):
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 24, generator=generator)
    routers = [ROUTERS[name](query_size=24) for _ in range(2)]
    routers[1].to(GPU)
    for task in range(3):
        classes = torch.arange(2 * task, 2 * task + 2).repeat(60)
        queries = centres[classes] + torch.randn(120, 24, generator=generator)
        for router in routers:
            router.configure(SimpleNamespace(**SMALL))
            router.learn(queries, classes)
    queries = centres.repeat(20, 1) + torch.randn(120, 24, generator=generator)
    here, there = (router(queries.to(router.prototypes.device)) for router in routers)
    torch.testing.assert_close(there.distances.cpu(), here.distances, rtol=1e-3, atol=1e-4)
    assert (there.selection.cpu() == here.selection).float().mean() > 0.98
    if routers[0].rejects:
        p_values = [
            router.typicality(queries.to(router.prototypes.device), routing.distances).cpu()
            for router, routing in zip(routers, (here, there), strict=True)
        ]
        assert (p_values[0] - p_values[1]).abs().max() < 0.03
    if hasattr(routers[0], "leave_one_out"):
        classes = torch.arange(6, 8).repeat(30)
        found = [router.leave_one_out(queries[:60], classes) for router in routers]
        if found[0] is not None:
            torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)


def test_sums_that_do_not_fit_are_taken_on_the_cpu():
    assert precision.for_sums(GPU, 1_000) == GPU
    assert precision.for_sums(GPU, 10**12) == torch.device("cpu")


def test_a_merged_expert_is_exported_from_the_gpu(stream, tmp_path):
    model = learn(s_lora(r=2, k=2), stream, tmp_path / "model").model
    torch.set_float32_matmul_precision("highest")
    export_merged(model, "task-001", tmp_path / "merged")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").to(GPU)
    pixels = torch.randn(4, *model.backbone.input_shape, device=GPU)
    with torch.no_grad():
        logits = model(pixels, expert=1).logits[:, 2:4]  # the classes of the second task
        torch.testing.assert_close(merged(pixels).logits, logits, rtol=1e-3, atol=1e-3)


def test_the_optimizer_is_fused_and_batches_come_from_pinned_memory(stream, tmp_path, monkeypatch):
    seen, loaders = [], []
    run, loader = StepLoop.run, torch.utils.data.DataLoader.__init__

    def looking(loop, *args):
        seen.append(loop.optimizer.param_groups[0]["fused"])
        run(loop, *args)

    def noting(self, *args, **options):
        loaders.append(options.get("pin_memory"))
        loader(self, *args, **options)

    monkeypatch.setattr(StepLoop, "run", looking)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", noting)
    learn(s_lora(r=1, k=2), stream, tmp_path)
    assert seen and all(seen) and loaders and all(pinned for pinned in loaders if pinned is not None)
