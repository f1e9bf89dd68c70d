"""What was tried beside SLDA++ stays runnable: each file of recipes/tried/ learns, is saved, and predicts the same."""

import runpy
from pathlib import Path

import pytest
import torch
from conftest import make_trainer

from hf_clpeft import METHODS, ContinualModel, load_benchmark
from hf_clpeft.config.method import OPTIONS


TRIED = {path.stem: path for path in (Path(__file__).parents[1] / "recipes" / "tried").glob("*.py")}
VIEWS = {"views": 2, "test_views": 2, "view_kind": "crop", "query_layers": [-2, -1], "covariance_rank": 16}
LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}


@pytest.fixture
def tried(request, monkeypatch):
    """The class of a method of recipes/tried/; it is gone afterwards."""
    for registry in (METHODS, OPTIONS):
        monkeypatch.setitem(registry, request.param, None)  # which takes it away at the end
    runpy.run_path(str(TRIED[request.param]))
    return METHODS[request.param]


@pytest.mark.parametrize(
    "tried, options",
    [
        ("two_view_judges", {}),
        ("against_others", {}),
        ("shared_lora", {}),
        ("louder_views", {}),
        ("on_device", {"router": "gaussian", "peft": LORA}),
        ("on_device", {"router": "klda", "kernel_features": 64, "peft": LORA}),
        ("on_device", {"router": "linear_ridge", "peft": LORA}),
        ("on_device", {"router": "ridge", "projection_size": 64, "peft": LORA}),
    ],
    indirect=["tried"],
)
def test_it_learns_and_predicts_the_same_once_loaded(tried, options):
    trainer = make_trainer(tried.Config(**VIEWS, **options), train_batch_size=16, learning_rate=5e-3)
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=32)[:2]
    assert trainer.learn_stream(stream).summary()["average_accuracy"] > 0.6
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model(images).logits for model in (ContinualModel.from_pretrained("out"), trainer.model))
    torch.testing.assert_close(found, expected)
