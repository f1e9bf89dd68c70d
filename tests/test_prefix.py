"""Prefixes are keys and values in front of a layer's own: by hand, in PEFT's files, in batches, and nowhere else."""

import copy
import json
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import make_trainer, pattern_dataset
from peft import PeftConfig, PrefixEncoder, PrefixTuningConfig
from safetensors.torch import load_file, save_file
from test_backbone_families import FAMILIES, TABLE, attempt, check_like_peft, save
from test_bank import TOLERANCE, bank_of, images, random_experts, small_backbone
from torch.nn.functional import softmax

from hf_clpeft import (
    METHODS,
    BackboneError,
    ConfigError,
    ContinualModel,
    Expert,
    ExpertBank,
    ExpertError,
    PrefixTunedVisionModel,
    TaskStream,
    load_backbone,
)
from hf_clpeft.config.adapters import check_peft
from hf_clpeft.experts.expert import make_peft_config, make_peft_model
from hf_clpeft.experts.prefix import insert_prefixes, prepare_for_prefixes


pytestmark = pytest.mark.usefixtures("shallow")
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
LAST = PREFIX | {"layers_to_transform": [1]}


@torch.no_grad()
def by_hand(model, pixels, prefixes):
    """[CLS] of a ViT whose attention is written out; `prefixes` are keys and values `(2, length, width)` by layer."""
    tokens = model.embeddings(pixels)
    for number, layer in enumerate(model.layers):
        attention, x = layer.attention, layer.layernorm_before(tokens)
        query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        if number in prefixes:
            more = prefixes[number].expand(len(x), -1, -1, -1)
            key, value = torch.cat([more[:, 0], key], dim=1), torch.cat([more[:, 1], value], dim=1)
        size, heads = attention.head_dim, []
        for start in range(0, x.shape[2], size):
            q, k, v = (states[..., start : start + size] for states in (query, key, value))
            heads.append(softmax(q @ k.mT / size**0.5, dim=-1) @ v)
        tokens = tokens + attention.o_proj(torch.cat(heads, dim=2))
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    return model.layernorm(tokens)[:, 0]


def states_of(expert):
    """Keys and values by layer, read as PEFT reads them for a language model's cache."""
    config, rows = expert.config, expert.tensors["prompt_embeddings"]
    shape = (config.num_virtual_tokens, config.num_layers, 2, config.num_attention_heads, -1)
    layers = getattr(config, "layers_to_transform", None)
    states = rows.view(shape).permute(1, 2, 0, 3, 4).flatten(3)  # layer, key or value, token, width
    return dict(zip(layers or range(config.num_layers), states, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 1}, {"layers_to_transform": [1]}], ids=str)
def test_features_are_those_of_attention_by_hand_in_a_mixed_batch_and_alone(options, attention):
    backbone = small_backbone()
    backbone.model.set_attn_implementation(attention)
    experts = random_experts(backbone, [PREFIX | options] * 3)
    bank, selection = ExpertBank(backbone), torch.tensor([2, 0, 1, 0])
    bank.extend(experts)
    with torch.no_grad():
        mixed = bank(images(4), selection)
        for row, chosen in enumerate(selection.tolist()):
            expected = by_hand(small_backbone().model, images(4)[row : row + 1], states_of(experts[chosen]))
            alone = bank(images(4)[row : row + 1], selection[row : row + 1])
            torch.testing.assert_close(mixed[row : row + 1], expected, **TOLERANCE)
            torch.testing.assert_close(mixed[row : row + 1], alone, **TOLERANCE)
        torch.testing.assert_close(bank_of(experts, "grouped")(images(4), selection), mixed, **TOLERANCE)
        assert not torch.allclose(mixed, bank.frozen(images(4)), atol=0.01)


def test_several_prefixes_stand_one_after_another_and_get_their_gradients():
    experts = random_experts(small_backbone(), [PREFIX] * 3)
    bank, selection = bank_of(experts), torch.tensor([[2, 0], [0, 1]])
    bank.table.rows.requires_grad_(True)
    found = bank(images(2), selection)
    for row, chosen in enumerate(selection.tolist()):
        several = [states_of(experts[index]) for index in chosen]
        prefixes = {layer: torch.cat([states[layer] for states in several], dim=1) for layer in several[0]}
        expected = by_hand(small_backbone().model, images(2)[row : row + 1], prefixes)
        torch.testing.assert_close(found[row : row + 1], expected, **TOLERANCE)
    found.square().sum().backward()
    gradient = bank.table.rows.grad
    assert all(gradient[bank.table.rows_of(index)].abs().sum() > 0 for index in range(3)) and not gradient[0].any()


def test_prefixes_of_other_lengths_run_grouped():
    experts = random_experts(small_backbone(), [PREFIX | {"num_virtual_tokens": n} for n in (1, 4)])
    bank, selection = bank_of(experts), torch.tensor([1, 0, 1])
    with torch.no_grad():
        found = bank(images(3), selection)
        for row, chosen in enumerate(selection.tolist()):
            expected = by_hand(small_backbone().model, images(3)[row : row + 1], states_of(experts[chosen]))
            torch.testing.assert_close(found[row : row + 1], expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_stays_near(attention, dtype):
    experts = random_experts(small_backbone(), [PREFIX] * 2)
    selection = torch.tensor([1, 0, 1])
    bank = bank_of(experts, dtype=dtype)
    bank.backbone.model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = bank_of(experts)(images(3), selection)
        with torch.autocast("cpu", dtype):
            mixed = bank_of(experts)(images(3), selection)
        found = bank(images(3), selection)
    assert found.dtype == dtype and bank.table.rows.dtype == torch.float32
    for features in (found, mixed):
        assert (features.float() - expected).norm() < 0.05 * expected.norm()


# Nowhere else


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_call_and_in_other_threads_every_output_is_as_before_to_the_bit(attention):
    backbone = small_backbone()
    backbone.model.set_attn_implementation(attention)
    pixels, found = images(3), []

    def outputs():
        with torch.no_grad():
            output = backbone.model(pixel_values=pixels, output_attentions=attention == "eager")
        return [output.last_hidden_state, *(output.attentions or ())]

    before = outputs()
    bank = ExpertBank(backbone)
    bank.extend(random_experts(backbone, [PREFIX] * 2))
    slot = bank.start("new", make_peft_config(PREFIX, backbone))  # on a twin
    with insert_prefixes({0: torch.randn(2, 5, 16)}):
        changed = outputs()
        thread = threading.Thread(target=lambda: found.append(outputs()))
        thread.start()
        thread.join()
    assert not torch.allclose(changed[0], before[0], atol=0.01)
    assert not torch.allclose(slot(pixel_values=pixels).last_hidden_state, before[0], atol=0.01)
    for after in (outputs(), *found):
        assert len(after) == len(before) and all(map(torch.equal, after, before))
    assert backbone.model.config._attn_implementation == attention


def test_the_implementation_may_be_changed_later():
    backbone = small_backbone()
    prepare_for_prefixes(backbone)
    backbone.model.set_attn_implementation("eager")
    prefix = torch.randn(2, 5, 16)
    with torch.no_grad(), insert_prefixes({1: prefix}):
        output = backbone.model(pixel_values=images(2), output_attentions=True)
    assert [weights.shape[-1] for weights in output.attentions] == [5, 10]
    expected = by_hand(small_backbone().model, images(2), {1: prefix})
    torch.testing.assert_close(output.last_hidden_state[:, 0], expected, **TOLERANCE)


def test_prefixes_of_a_context_and_of_experts_add_up_and_each_image_may_have_its_own():
    backbone = small_backbone()
    expert = random_experts(backbone, [LAST])[0]
    bank = ExpertBank(backbone)
    bank.extend([expert])
    own, last = torch.randn(2, 2, 4, 16), states_of(expert)[1]
    nothing = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        with insert_prefixes({0: own}), insert_prefixes({1: last[:, :1]}):
            found = bank(images(2), nothing)
            slot = bank.start("expert-0", expert.config)
            trained = bank.under_training(images(2))
        both = torch.cat([last[:, :1], last], dim=1)
        for row in range(2):
            expected = by_hand(small_backbone().model, images(2)[row : row + 1], {0: own[row], 1: both})
            torch.testing.assert_close(found[row : row + 1], expected, **TOLERANCE)
        torch.testing.assert_close(trained, found, **TOLERANCE)
        plain = by_hand(small_backbone().model, images(2), {1: last})
        torch.testing.assert_close(slot(pixel_values=images(2)).last_hidden_state[:, 0], plain, **TOLERANCE)


def test_a_copy_of_a_bank_runs_by_itself_and_layers_can_be_cut():
    bank = bank_of(random_experts(small_backbone(), [PREFIX] * 2))
    selection = torch.tensor([0, 1])
    with torch.no_grad():
        before, twin = bank(images(2), selection), copy.deepcopy(bank)
        bank.table.rows.zero_()
        assert torch.equal(twin(images(2), selection), before)
        assert torch.equal(twin(images(2), selection, layers=2), before)
        assert not torch.allclose(twin(images(2), selection, layers=1), twin.frozen(images(2), layers=1), atol=0.01)


def test_a_compiled_bank_is_not_compiled_again_for_a_selection_or_an_expert():
    from torch._dynamo.testing import CompileCounter

    experts = random_experts(small_backbone(), [PREFIX] * 4)
    bank = bank_of(experts[:2])
    bank.reserve(4)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(bank, backend=counter, fullgraph=True)
    with torch.no_grad():
        for added, selection in ((0, [0, 1, 0]), (0, [1, 1, 0]), (2, [2, 3, 1])):
            bank.extend(experts[len(bank) : len(bank) + added])
            selection = torch.tensor(selection)
            torch.testing.assert_close(compiled(images(3), selection), bank(images(3), selection), **TOLERANCE)
    assert counter.frame_count == 1


# PEFT's model, configuration and file


def test_the_model_takes_pefts_own_configuration_and_leaves_no_trace():
    backbone = small_backbone()
    model = PrefixTunedVisionModel(backbone.model, PrefixTuningConfig(num_virtual_tokens=3, num_layers=1))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["prompt_encoder.default.embedding.weight"]
    with torch.no_grad():
        plain = small_backbone().tokens(images(2))[:, 0]
        found = model(pixel_values=images(2)).last_hidden_state[:, 0]
        expert = Expert.from_peft_model("one", model)
        torch.testing.assert_close(found, by_hand(small_backbone().model, images(2), states_of(expert)), **TOLERANCE)
        with model.disable_adapter():
            assert torch.equal(model(pixel_values=images(2)).last_hidden_state[:, 0], plain)
        assert torch.equal(model.unload()(pixel_values=images(2)).last_hidden_state[:, 0], plain)


def test_zeros_to_start_with_and_the_scale_of_prompts_otherwise():
    tensors = {}
    for how in (None, "zero"):
        config = make_peft_config(PREFIX | {"num_virtual_tokens": 100, "init_weights": how}, small_backbone())
        expert = Expert.from_peft_model("one", make_peft_model(small_backbone(), config))
        tensors[how] = expert.tensors["prompt_embeddings"]
    assert not tensors["zero"].any() and 0.019 < tensors[None].std() < 0.021


def test_files_are_pefts_and_keep_the_layers(tmp_path):
    expert = random_experts(small_backbone(), [LAST])[0]
    expert.save(tmp_path)
    assert {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "prompt_embeddings": (3, 1 * 2 * 16)
    }
    again = Expert.load("again", tmp_path)
    assert again.config.layers_to_transform == [1] and again.config.num_layers == 1
    assert torch.equal(
        bank_of([again])(images(2), torch.zeros(2).long()), bank_of([expert])(images(2), torch.zeros(2).long())
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(tmp_path)
    assert "layers_to_transform" in str(told[0].message)
    encoder = PrefixEncoder(config)
    encoder.load_prompt_embeddings(again.tensors["prompt_embeddings"])
    # What PEFT itself writes, without a choice of layers, is for the first ones.
    (tmp_path / "plain").mkdir()
    config.save_pretrained(tmp_path / "plain")
    save_file(again.tensors, tmp_path / "plain" / "adapter_model.safetensors")
    plain = Expert.load("plain", tmp_path / "plain")
    first = {0: states_of(expert)[1]}
    found = bank_of([plain])(images(2), torch.zeros(2).long())
    torch.testing.assert_close(found, by_hand(small_backbone().model, images(2), first), **TOLERANCE)


STRANGE = {
    "too few layers": ({"num_layers": 3}, None, "its 3 layers end with index 2, of 2 layers"),
    "a layer beyond": ({"layers_to_transform": [0, 7]}, None, "end with index 7, of 2 layers"),
    "another width": ({"token_dim": 32}, None, "token_dim=32, and the backbone's is 16"),
    "another length": ({"num_virtual_tokens": 4}, None, r"has shape \(3, 64\) and should have \(4, 64\)"),
    "fewer layers": ({"num_layers": 1}, None, r"has shape \(3, 64\) and should have \(3, 32\)"),
    "another number": ({"layers_to_transform": [1]}, None, "num_layers=2, but layers_to_transform"),
    "not rising": ({"layers_to_transform": [1, 0]}, None, "must be a list of rising indices"),
    "twice": ({"layers_to_transform": [1, 1]}, None, "must be a list of rising indices"),
    "none": ({"layers_to_transform": []}, None, "must be a list of rising indices"),
    "no layers": ({"num_layers": 0}, None, "num_layers=0 must be a whole number"),
    "a network": ({"prefix_projection": True}, None, "prefix_projection=True trains a network"),
    "a tensor more": ({}, {"more": torch.zeros(1)}, "1 unexpected keys"),
    "wrong shape": ({}, {"prompt_embeddings": torch.zeros(3, 63)}, r"has shape \(3, 63\)"),
    "flat": ({}, {"prompt_embeddings": torch.zeros(192)}, r"has shape \(192,\)"),
    "not finite": ({}, {"prompt_embeddings": torch.full((3, 64), torch.nan)}, "not finite"),
    "a prompt": ({"peft_type": "PROMPT_TUNING"}, None, "encoder_hidden_size"),
}


@pytest.mark.parametrize("values, tensors, message", STRANGE.values(), ids=STRANGE)
def test_a_strangers_adapter_that_does_not_fit_is_refused(values, tensors, message, tmp_path):
    random_experts(small_backbone(), [PREFIX])[0].save(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    save_file(load_file(weights) | (tensors or {}), weights)
    bank = ExpertBank(small_backbone())
    with pytest.raises(ExpertError, match=message):
        bank.extend([Expert.load("strange", tmp_path)])
    assert not len(bank)


def test_a_bank_holds_prefixes_for_the_same_layers_alone():
    experts = random_experts(small_backbone(), [LAST])
    bank = bank_of(experts)
    for other in (PREFIX, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, {"peft_type": "LORA", "r": 1}):
        with pytest.raises(ExpertError, match="does not fit a bank with"):
            bank.extend([replace(random_experts(small_backbone(), [other])[0], name="other")])
    assert len(bank) == 1


def test_too_many_tokens_are_refused_before_they_take_memory():
    for values in ({"num_virtual_tokens": 5000}, {"num_layers": 10**6}, {"token_dim": 10**9}):
        with pytest.raises(ConfigError, match="must be a whole number"):
            check_peft(PREFIX | values)
    with pytest.raises(ExpertError, match="its 900 layers end with index 899, of 2 layers"):
        make_peft_model(small_backbone(), make_peft_config(PREFIX | {"num_layers": 900}, small_backbone()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_backbones_tells_the_truth(name, tmp_path):
    rows = [line.strip("|").split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    told = {row[0].strip(): row[5].strip() for row in rows[2:]}
    save(name, tmp_path / name)
    assert attempt(lambda: check_like_peft(load_backbone(str(tmp_path / name)), PREFIX)) == told[name]


@pytest.mark.parametrize(
    "name, why",
    {
        "Swin": "its keys and values differ in width from its tokens",
        "ConvNeXt": "it outputs a feature map, as a ConvNet does, instead of tokens",
        "data2vec vision": "its layers do not use the attention interface of `transformers`",
        "Hiera": "its stages differ in width",
    }.items(),
)
def test_backbones_that_cannot_take_prefixes_say_why(name, why, tmp_path):
    save(name, tmp_path / name)
    with pytest.raises(BackboneError, match=f"does not support prefixes: {why}"):
        load_backbone(str(tmp_path / name)).check_prefixes()


def test_an_implementation_without_a_meta_kernel_is_wrapped_too(monkeypatch):
    from transformers import AttentionInterface

    backbone = small_backbone()

    def kernel(layer, query, key, value, mask, **options):
        assert not query.is_meta and mask is None
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "without_meta", kernel)
    backbone.model.set_attn_implementation("without_meta")
    backbone.check_prefixes()
    prepare_for_prefixes(backbone)
    prefix = torch.randn(2, 5, 16)
    with torch.no_grad(), insert_prefixes({0: prefix}):
        expected = by_hand(small_backbone().model, images(2), {0: prefix})
        torch.testing.assert_close(backbone(images(2)), expected, **TOLERANCE)


# Methods


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6, per_class=8), num_tasks=3)


@torch.no_grad()
def logits(model):
    return model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("name", ["s_x", "s_x_mix"])
def test_methods_train_save_load_and_push_prefixes(name, hub, stream):
    peft = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "layers_to_transform": [2, 3]}
    trainer = make_trainer(METHODS[name].Config(peft=peft), num_train_epochs=4)
    report = trainer.learn_stream(stream)
    assert report.summary()["average_accuracy"] > 0.7
    assert trainer.model.bank.table.layers == [2, 3] and trainer.model.bank.num_parameters == 3 * 5 * 2 * 2 * 128
    loaded = ContinualModel.from_pretrained("out")
    assert torch.equal(logits(loaded), logits(trainer.model))
    loaded.push_to_hub("alice/prefixes", token="hf_alice")
    assert torch.equal(logits(ContinualModel.from_pretrained("alice/prefixes", token="hf_alice")), logits(loaded))
    assert "PREFIX_TUNING" in hub.repo("alice/prefixes").files()["README.md"].decode()
    assert "a plain PEFT adapter" not in hub.repo("alice/prefixes").files()["README.md"].decode()


def test_a_pool_of_prefixes_learns(stream):
    with pytest.raises(ConfigError, match="readout='prompts' needs a pool of prompts"):
        METHODS["l2x"].Config(peft=PREFIX, readout="prompts")
    trainer = make_trainer(METHODS["l2x"].Config(peft=PREFIX, pool_size=4, top_n=2), num_train_epochs=4)
    trainer.learn_stream(stream[:2])
    model = ContinualModel.from_pretrained("out")
    assert len(model.bank) == 4 and torch.equal(logits(model), logits(trainer.model))
