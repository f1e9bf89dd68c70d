"""torch.export records the whole forward pass of a model: query, router, experts, head, for batches of any size."""

import pytest
import torch
from test_every_method import NAMES, taught_on_two_layers
from test_export import two_layers, untaught

from hf_clpeft import ConfigError, ContinualModel, ExpertError


BATCH = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}


def images(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check(model):
    """A recorded model says what the model says, which is not changed by it."""
    recorded = torch.export.export(model, (images(4),), dynamic_shapes=BATCH).module()
    for count in (1, 3, 8):
        wanted, found = model(images(count, seed=count)), recorded(images(count, seed=count))
        assert torch.equal(found.selection, wanted.selection)
        for name in ("logits", "distances"):
            largest = wanted[name].nan_to_num(neginf=0.0).abs().max().item()
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4 * max(1, largest), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_one_graph_as_soon_as_it_is_loaded(name, backbone, tmp_path):
    model = taught_on_two_layers(name, backbone, tmp_path)
    check(ContinualModel.from_pretrained(tmp_path, backbone=model.backbone))


OPTIONS = {
    "a head per task": ("s_lora", {"head": "per_task"}),
    "classes that came again": ("s_lora", {"tasks": (["cat", "dog"], ["dog", "emu"])}),
    "a task of one class": ("s_lora", {"tasks": (["cat"], ["dog", "emu"])}),
    "prefixes": ("s_x", {"peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}}),
    "upper layers alone": ("s_lora", {"expert_layers": [-2, -1]}),
    "one expert without a fused form": ("single", {"peft": {"peft_type": "LORA", "use_dora": True}}),
}


@pytest.mark.parametrize("method, options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_recorded(method, options, backbone):
    model = untaught(method, backbone=two_layers(backbone), **options)
    model(images(2))
    check(model)


def test_what_changed_since_it_was_read_is_not_taken_for_what_is(backbone):
    model = untaught(backbone=two_layers(backbone))
    with pytest.raises(ConfigError, match="Call the model once"):
        torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    model(images(2))
    check(model)
    model.remove("task-001")
    with pytest.raises(ConfigError, match="Call the model once"):
        torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    model(images(2))
    check(model)


def test_experts_that_run_one_after_another_are_refused():
    model = untaught(lora={"use_dora": True})
    model(images(2))
    with pytest.raises(ExpertError, match="one after another.*choose LoRA"):
        torch.export.export(model, (images(2),), dynamic_shapes=BATCH)


def test_a_class_of_few_pictures_is_recorded(backbone):
    model = untaught(backbone=two_layers(backbone))
    model.router.learns_few = True
    model.start_task("photos", ["yak"])
    model.finish_task(lambda features: (features(images(5)), torch.zeros(5, dtype=torch.int64)), num_train_images=5)
    assert model.router.few.any() and not model.router.few.all()
    model(images(2))
    check(model)
