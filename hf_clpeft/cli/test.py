"""`hf-clpeft test`: checks the installation."""

import time
from tempfile import TemporaryDirectory

import typer

from .common import AsJson, quieten, show


def test(as_json: AsJson = False) -> None:
    """Learn two tasks of digits with the bundled backbone, save, load and predict; works offline."""
    import torch

    from .. import ContinualModel, ContinualTrainer, ContinualTrainingArguments, load_benchmark, s_lora

    quieten()
    start = time.perf_counter()
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=24)[:2]
    with TemporaryDirectory() as folder:
        model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(r=1, k=10))
        args = ContinualTrainingArguments(
            output_dir=folder, num_train_epochs=4, train_batch_size=16, learning_rate=1e-2, disable_tqdm=True
        )
        report = ContinualTrainer(model, args).learn_stream(stream)
        loaded = ContinualModel.from_pretrained(folder).to(model.device)
    images = [encoded for task in stream for encoded, _, _ in task.test or ()]
    before, after = model.predict(images), loaded.predict(images)
    results = {
        "learns": report.summary()["average_accuracy"] > 0.6,
        "routes": report.summary()["routing_accuracy"] > 0.6,
        "loads what it saved": [p.label for p in before] == [p.label for p in after],
        "device": str(model.device),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "next": "hf-clpeft demo",
    }
    show(results, as_json)
    if not all(value for value in results.values() if isinstance(value, bool)):
        raise typer.Exit(1)
