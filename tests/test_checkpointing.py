"""Gradient checkpointing: the same loss and gradients with less memory."""

import pytest
import torch
from test_bank import images, random_experts, small_backbone
from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

from hf_clpeft import METHODS, Backbone, Batch, ConfigError, ContinualConfig
from hf_clpeft.config import BackboneConfig, TaskConfig
from hf_clpeft.experts.checkpointing import set_checkpointing
from hf_clpeft.methods import make_method
from hf_clpeft.training.arguments import ContinualTrainingArguments


CLASSES = ["cat", "dog"]


def step_of(options, checkpointing, tasks=2):
    """Loss, gradients and bytes kept for the backward pass, of the last of several tasks."""
    torch.manual_seed(0)
    backbone = small_backbone()
    set_checkpointing(backbone, checkpointing)
    method = make_method(backbone, ContinualConfig(options, backbone.config))
    pixels, labels = images(6), torch.tensor([0, 1] * 3)
    for number in range(tasks):
        names = [f"{name} {number}" for name in CLASSES]
        method.start(TaskConfig(f"task-{number}", names))
        labels = torch.tensor([0, 1] * 3) + 2 * number
        method.prepare(lambda function, labels=labels: (function(pixels), labels))
        groups = method.parameter_groups(ContinualTrainingArguments())
        parameters = [parameter for group in groups for parameter in group["params"]]
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if number == tasks - 1:
            break
        with torch.no_grad():
            method.finish(lambda function, labels=labels: (function(pixels), labels))
        method.config.tasks.append(TaskConfig(f"task-{number}", names))
        method.config.classes += names
    query = method.query(pixels).detach() if method.trains_by_query else None
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method.loss(Batch(pixels, labels, query)).mean()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in parameters], sum(kept.values())


@pytest.mark.parametrize("name", ["s_lora", "s_prompts", "sd_lora", "l2p", "l2l", "dualprompt"])
def test_loss_and_gradients_are_the_same_and_take_less_memory(name):
    """Of one expert, of one on top of others, of a pool, of prompts and of prefixes."""
    options = METHODS[name].Config()
    (loss, gradients, kept), (again, repeated, less) = (step_of(options, on) for on in (False, True))
    assert torch.equal(loss, again) and less < 0.6 * kept
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    for gradient, other in zip(gradients, repeated, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-7)


def test_it_is_switched_off_again():
    backbone = small_backbone()
    layer = backbone.model.layers[0]
    set_checkpointing(backbone, True)
    assert "forward" in vars(layer)
    set_checkpointing(backbone, False)
    assert "forward" not in vars(layer)


def test_an_architecture_without_suitable_layers_is_refused():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    backbone = Backbone(ResNetModel(config), processor, BackboneConfig("resnet", 32, "0"))
    with pytest.raises(ConfigError, match="gradient_checkpointing.*ResNetModel"):
        set_checkpointing(backbone, True)


def test_experts_of_other_images_are_not_taken_in_the_backward_pass():
    """Each layer is repeated with the experts of its own forward pass, also after another one."""
    from hf_clpeft import ExpertBank

    gradients = []
    for enabled in (False, True):
        backbone = small_backbone()
        set_checkpointing(backbone, enabled)
        bank = ExpertBank(backbone)
        bank.extend(random_experts(backbone, [{"peft_type": "LORA", "r": 2}] * 3))
        bank.table.rows.requires_grad_(True)
        first = bank(images(2), torch.tensor([0, 1])).square().sum()
        bank(images(2, seed=1), torch.tensor([2, 2]))
        first.backward()
        gradients.append(bank.table.rows.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_it_is_not_compiled():
    with pytest.raises(ConfigError, match="leave out one of them"):
        ContinualTrainingArguments(gradient_checkpointing=True, torch_compile=True)
