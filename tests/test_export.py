"""Experts that are used without this library say what they say with it."""

from functools import partial

import pytest
import torch
from conftest import BACKBONE
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTModel,
    pipeline,
)

from hf_clpeft import METHODS, Backbone, ContinualModel, ExpertError, PromptTunedVisionModel, load_backbone
from hf_clpeft.config import ContinualConfig
from hf_clpeft.config.errors import ConfigError
from hf_clpeft.export import export_adapter, export_merged
from hf_clpeft.streams.images import open_image


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def untaught(method="s_lora", tasks=(["cat", "dog"], ["owl", "emu"]), backbone=None, domains=False, **options):
    """A model whose every weight matters, though no image taught it."""
    backbone = backbone or load_backbone(BACKBONE)
    model = ContinualModel(backbone, ContinualConfig(METHODS[method].Config(**options), backbone.config))
    generator = torch.Generator().manual_seed(0)
    for i, classes in enumerate(tasks):
        model.start_task(f"task-{i:03d}", classes, f"domain {i}" if domains else None)
        for parameter in model.method.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        query = torch.randn(6, model.method.query_size, generator=generator)
        model.finish_task(lambda features, query=query: (query, torch.zeros(6, dtype=int)), num_train_images=0)
    return model


def logits_of(model, number, images=IMAGES):
    """The model's logits for the classes of one task, under that task's expert."""
    expert = model.method.expert_of(number)
    columns = [model.config.classes.index(label) for label in model.config.tasks[number].classes]
    with torch.no_grad():
        features = model.bank(images, torch.full((len(images),), expert))
        return model.heads(features, torch.full((len(images),), number))[:, columns]


def logits_from(folder, images=IMAGES):
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder)(images).logits


def test_an_exported_adapter_gives_the_same_features_with_peft(learnt, backbone):
    export_adapter(learnt.model, "task-001", "adapter")
    kind = learnt.model.config.method.peft["peft_type"]
    make = PromptTunedVisionModel if kind == "PROMPT_TUNING" else PeftModel
    model = make.from_pretrained(load_backbone(BACKBONE).model, "adapter")
    with torch.no_grad():
        features = learnt.model.bank(IMAGES, torch.ones(6, dtype=int))
        torch.testing.assert_close(model(pixel_values=IMAGES).last_hidden_state[:, 0], features, atol=1e-5, rtol=0)


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_merged_expert_is_a_plain_image_classifier(learnt, tmp_path):
    model = learnt.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    export_merged(model, "task-002", tmp_path / "merged")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    torch.testing.assert_close(logits_from(tmp_path / "merged"), logits_of(model, 2), atol=1e-4, rtol=0)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 and "lora" not in key for key, tensor in tensors.items())


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_pipeline_over_a_merged_expert_agrees_with_the_model(learnt):
    model, task = learnt.model, learnt.stream[2]
    export_merged(model, task.name, "merged")
    classify = pipeline("image-classification", "merged")
    images = [open_image(encoded) for encoded, _, _ in task.test]
    pixels = model.backbone.transform.resize(images)
    scores = logits_of(model, 2, model.backbone.transform.normalize(torch.from_numpy(pixels))).softmax(dim=1)
    for answer, expected in zip(classify(images), scores, strict=True):
        found = {line["label"]: line["score"] for line in answer}
        assert set(found) == set(task.classes)
        assert [found[label] for label in task.classes] == pytest.approx(expected.tolist(), abs=1e-3)


OPTIONS = {
    "one head": {},
    "a head per task": {"head": "per_task"},
    "retrained rows": {"tasks": (["cat", "dog"], ["dog", "emu"], ["emu", "cat"])},
    "the same classes in domains": {"tasks": (["cat", "dog"], ["dog", "cat"]), "domains": True},
    "one expert": {"method": "sequential_lora"},
    "grouped, the slot in use": {"lora": {"use_dora": True}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_task_has_its_own_rows_and_labels(options):
    model = untaught(**options)
    for number, task in enumerate(model.config.tasks):
        export_merged(model, task.name, task.name)
        torch.testing.assert_close(logits_from(task.name), logits_of(model, number), atol=1e-4, rtol=1e-5)
        config = AutoModelForImageClassification.from_pretrained(task.name).config
        assert list(config.id2label.values()) == task.classes
        assert config.label2id == {label: i for i, label in enumerate(task.classes)}


def test_interpolated_positions_are_exported_with_their_size():
    model = untaught(backbone=load_backbone(BACKBONE, image_size=48))
    export_merged(model, "task-001", "merged")
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_from("merged", images), logits_of(model, 1, images), atol=1e-4, rtol=1e-5)
    assert AutoModelForImageClassification.from_pretrained("merged").config.image_size == 48
    assert pipeline("image-classification", "merged").image_processor.size["height"] == 48


def other_backbone(backbone, model_class, config_class, layers=2):
    size = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = config_class(num_hidden_layers=layers, **size)
    return Backbone(model_class(config), backbone.processor, backbone.config)


def two_layers(backbone):
    """A ViT of two layers, so that a graph of it is made in seconds."""
    return other_backbone(backbone, partial(ViTModel, add_pooling_layer=False), ViTConfig)


def one_layer(backbone):
    """For tests that make several graphs, or look at something else."""
    return other_backbone(backbone, partial(ViTModel, add_pooling_layer=False), ViTConfig, layers=1)


def test_a_classifier_that_reads_more_than_cls_reads_it_with_zeros(backbone):
    model = untaught(backbone=other_backbone(backbone, Dinov2Model, Dinov2Config))
    export_merged(model, "task-000", "merged")
    torch.testing.assert_close(logits_from("merged"), logits_of(model, 0), atol=1e-4, rtol=1e-5)


def test_a_model_without_cls_is_classified_by_the_mean_of_its_patches(backbone):
    model = untaught(backbone=other_backbone(backbone, IJepaModel, IJepaConfig))
    export_merged(model, "task-000", "merged")
    torch.testing.assert_close(logits_from("merged"), logits_of(model, 0), atol=1e-4, rtol=1e-5)


def test_a_classifier_that_reads_something_else_is_refused(backbone, tmp_path, monkeypatch):
    model = untaught(backbone=other_backbone(backbone, IJepaModel, IJepaConfig))
    monkeypatch.setattr(model.backbone, "_has_cls", True)  # so that the model reads the first patch
    with pytest.raises(ExpertError, match="IJepaForImageClassification .* does not classify .CLS. as the model does"):
        export_merged(model, "task-000", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_backbone_without_a_classifier_is_refused(backbone):
    from transformers import ViTMAEConfig, ViTMAEModel

    model = untaught(backbone=other_backbone(backbone, ViTMAEModel, ViTMAEConfig))
    with pytest.raises(ExpertError, match="no image classifier around a ViTMAEModel"):
        export_merged(model, "task-000", "merged")


def test_a_half_precision_model_is_not_merged():
    model = untaught(backbone=load_backbone(BACKBONE, dtype="bfloat16"))
    with pytest.raises(ExpertError, match="load it in float32"):
        export_merged(model, "task-000", "merged")


@pytest.mark.parametrize("learnt", ["s_prompts"], indirect=True)
def test_prompts_cannot_be_merged(learnt):
    with pytest.raises(ExpertError, match="no weights to merge into. Write it with export_adapter"):
        export_merged(learnt.model, "task-000", "merged")


@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_an_unknown_task_is_refused_with_the_known_ones(learnt, export):
    with pytest.raises(ConfigError, match="no task 'task-009'; it knows task-000, task-001, task-002"):
        export(learnt.model, "task-009", "out")


@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_a_pool_has_no_expert_of_a_task(export):
    with pytest.raises(ExpertError, match="l2l has no expert that belongs to a task"):
        export(untaught("l2l"), "task-000", "out")


def test_a_method_with_another_head_has_adapters_alone():
    model = untaught()
    model.method.heads = None
    with pytest.raises(ExpertError, match="s_lora has no linear head .* Write the expert of 'task-000'"):
        export_merged(model, "task-000", "merged")
    export_adapter(model, "task-000", "adapter")
