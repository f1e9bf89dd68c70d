"""The bank gives every image of a batch what PEFT gives it alone: outputs and gradients, in every form."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from peft import PeftModel, set_peft_model_state_dict
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from hf_clpeft import Backbone, Expert, ExpertBank, ExpertError
from hf_clpeft.config import BackboneConfig
from hf_clpeft.experts import lora
from hf_clpeft.experts.expert import make_peft_config, make_peft_model


SIZE, TOLERANCE = 16, {"atol": 1e-5, "rtol": 0}
TECHNIQUES = {
    "ia3": {"peft_type": "IA3", "feedforward_modules": []},
    "vera": {"peft_type": "VERA", "r": 4},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True},
    "adalora": {"peft_type": "ADALORA", "init_r": 2, "target_r": 2, "total_step": 10},
    "loha": {"peft_type": "LOHA", "r": 2},
    "oft": {"peft_type": "OFT", "oft_block_size": 8},
    "ln_tuning": {"peft_type": "LN_TUNING", "target_modules": ["layernorm_before", "layernorm_after", "layernorm"]},
    "lora_on_patches": {"peft_type": "LORA", "r": 2, "target_modules": ["projection"]},
    "lora_by_layer": {"peft_type": "LORA", "r": 2, "rank_pattern": {"layers.0.attention.q_proj": 4}},
}


@cache
def _small_backbone(dtype):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
        initializer_range=0.3,
    )
    model = ViTModel(config, add_pooling_layer=False).to(dtype)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return Backbone(model, processor, BackboneConfig("small", SIZE, "0")), torch.get_rng_state()


def small_backbone(dtype=torch.float32):
    """A copy, as it takes long to try one out; random numbers go on as after making one."""
    backbone, random_state = _small_backbone(dtype)
    torch.set_rng_state(random_state)
    return copy.deepcopy(backbone)


def random_experts(backbone, arguments, seed=0):
    """Experts whose every weight matters."""
    generator, experts = torch.Generator().manual_seed(seed), []
    for i, options in enumerate(arguments):
        peft_model = make_peft_model(copy.deepcopy(backbone), make_peft_config(options, backbone))
        expert = Expert.from_peft_model(f"expert-{i}", peft_model)
        for tensor in expert.tensors.values():
            tensor.copy_(tensor + 0.3 * torch.randn(tensor.shape, generator=generator))
        experts.append(expert)
    return experts


def bank_of(experts, form="auto", dtype=torch.float32):
    bank = ExpertBank(small_backbone(dtype), form)
    bank.extend(experts)
    return bank


def peft_with(experts):
    """All LoRA experts in one PEFT model."""
    peft_model = PeftModel(small_backbone().model, copy.deepcopy(experts[0].config), adapter_name=experts[0].name)
    for expert in experts[1:]:
        peft_model.add_adapter(expert.name, copy.deepcopy(expert.config))
    for expert in experts:
        set_peft_model_state_dict(peft_model, expert.tensors, adapter_name=expert.name)
    return peft_model


def images(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


TARGETS = (["q_proj", "v_proj"], ["fc1", "fc2"], ["q_proj", "k_proj", "v_proj", "o_proj", "fc2"])


@st.composite
def lora_cases(draw):
    ranks = draw(st.lists(st.integers(1, 16), min_size=1, max_size=4))
    targets = draw(st.sampled_from(TARGETS))
    alphas = [draw(st.sampled_from([1, 4, 16])) for _ in ranks]
    rslora = draw(st.booleans())
    arguments = [
        {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": targets}
        for r, alpha in zip(ranks, alphas, strict=True)
    ]
    batch, several = draw(st.integers(1, 6)), draw(st.integers(0, len(ranks)))
    pick = st.permutations(range(len(ranks)))
    selection = torch.tensor([draw(pick)[: max(several, 1)] for _ in range(batch)])
    return arguments, selection if several else selection[:, 0], draw(st.integers(0, 1000))


def test_on_a_cpu_a_layer_indexes_its_own_columns_when_it_runs_to_the_same_bits(monkeypatch):
    indexed = []

    def recorded(components, rows):
        indexed.append(rows.shape[1])
        return torch.nn.functional.embedding(components, rows)

    monkeypatch.setattr(lora, "embedding", recorded)
    options = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj", "fc2"]}
    bank = bank_of(random_experts(small_backbone(), 3 * [options]))
    selection = torch.tensor([2, 0, 1])
    together = bank(images(3), selection)
    assert indexed == [bank.table.rows.shape[1]]
    with torch.no_grad():
        assert torch.equal(bank(images(3), selection), together)
    assert len(indexed) > 1 and max(indexed[1:]) < indexed[0] / 2 and sum(indexed[1:]) == indexed[0]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lora_cases())
def test_lora_gives_pefts_outputs_and_gradients(case):
    arguments, selection, seed = case
    experts = random_experts(small_backbone(), arguments, seed)
    pixels = images(len(selection), seed)
    probe = torch.randn(len(selection), 16, generator=torch.Generator().manual_seed(seed))
    reference = peft_with(experts)
    expected = []
    for row, chosen in enumerate(selection.reshape(len(selection), -1).tolist()):
        reference.base_model.set_adapter([experts[index].name for index in chosen])
        feature = reference(pixel_values=pixels[row : row + 1]).last_hidden_state[:, 0]
        (feature * probe[row]).sum().backward()
        expected.append(feature.detach())
    gradients = dict(reference.named_parameters())
    for form in ("stacked", "gathered"):
        bank = bank_of(experts, form)
        bank.table.rows.requires_grad_(True)
        features = bank(pixels, selection)
        torch.testing.assert_close(features.detach(), torch.cat(expected), **TOLERANCE)
        (features * probe).sum().backward()
        scale = max(1.0, float(bank.table.rows.grad.abs().max()))
        for index, expert in enumerate(experts):
            found = bank.table.unpack(bank.table.rows.grad[bank.table.rows_of(index)])
            for key, gradient in found.items():
                wanted = gradients[key.replace(".weight", f".{expert.name}.weight")].grad
                wanted = torch.zeros_like(gradient) if wanted is None else wanted
                torch.testing.assert_close(gradient / scale, wanted / scale, **TOLERANCE)


def test_one_expert_per_image_is_what_pefts_adapter_names_gives():
    arguments = [{"peft_type": "LORA", "r": rank} for rank in (1, 3, 2, 1, 16)]
    experts = random_experts(small_backbone(), arguments)
    selection = torch.tensor([4, 0, 2, 2, 1, 3, 0])
    names = [experts[index].name for index in selection]
    with torch.no_grad():
        reference = peft_with(experts).eval()
        expected = reference(pixel_values=images(7), adapter_names=names).last_hidden_state[:, 0]
        for form in ("auto", "stacked", "gathered", "grouped"):
            torch.testing.assert_close(bank_of(experts, form)(images(7), selection), expected, **TOLERANCE)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_other_technique_runs_grouped_and_gives_what_peft_gives_alone(name):
    experts = random_experts(small_backbone(), [TECHNIQUES[name]] * 3)
    bank, selection = bank_of(experts), torch.tensor([2, 0, 1, 0, 2, 2])
    assert bank.table is None
    with torch.no_grad():
        found = bank(images(6), selection)
        for index, expert in enumerate(experts):
            alone = make_peft_model(small_backbone(), copy.deepcopy(expert.config))
            set_peft_model_state_dict(alone, expert.tensors)
            expected = alone(pixel_values=images(6)).last_hidden_state[:, 0]
            torch.testing.assert_close(found[selection == index], expected[selection == index], **TOLERANCE)
        torch.testing.assert_close(bank.frozen(images(6)), small_backbone()(images(6)), atol=0, rtol=0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 1000))
def test_prompts_give_what_pefts_prompt_gives_alone(lengths, seed):
    arguments = [{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": length} for length in lengths]
    experts = random_experts(small_backbone(), arguments, seed)
    bank = bank_of(experts)
    selection = torch.randint(len(experts), (6,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = bank(images(6), selection)
        for index, expert in enumerate(experts):
            alone = make_peft_model(small_backbone(), expert.config)
            expert.copy_to(alone)
            expected = alone(pixel_values=images(6)).last_hidden_state[:, 0]
            torch.testing.assert_close(found[selection == index], expected[selection == index], **TOLERANCE)


def test_several_prompts_stand_one_after_another_and_get_pefts_gradients():
    experts = random_experts(small_backbone(), [{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}] * 3)
    bank, selection = bank_of(experts), torch.tensor([[2, 0], [0, 1]])
    bank.table.rows.requires_grad_(True)
    prompts = [expert.tensors["prompt_embeddings"].clone().requires_grad_() for expert in experts]
    backbone = small_backbone()
    expected = []
    for row, chosen in enumerate(selection.tolist()):
        config = make_peft_config({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, backbone)
        alone = make_peft_model(backbone, config)
        weight = torch.cat([prompts[index] for index in chosen])
        del alone.prompt_encoder["default"].embedding.weight
        alone.prompt_encoder["default"].embedding.weight = weight
        expected.append(alone(pixel_values=images(2)[row : row + 1]).last_hidden_state[:, 1:5].mean(dim=1))
        alone.unload()
    features = bank(images(2), selection, readout="prompts")
    torch.testing.assert_close(features, torch.cat(expected), **TOLERANCE)
    features.square().sum().backward()
    torch.cat(expected).square().sum().backward()
    for index, prompt in enumerate(prompts):
        torch.testing.assert_close(bank.table.rows.grad[bank.table.rows_of(index)], prompt.grad, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["stacked", "gathered"])
def test_half_precision_stays_near_pefts(form, dtype):
    experts = random_experts(small_backbone(), [{"peft_type": "LORA", "r": 2}] * 3)
    selection = torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        expected = bank_of(experts, "grouped")(images(4), selection)
        found = bank_of(experts, form, dtype)(images(4), selection)
        with torch.autocast("cpu", dtype):
            mixed = bank_of(experts, form)(images(4), selection)
    for features in (found, mixed):
        assert (features.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "form, arguments",
    [
        ("stacked", {"peft_type": "LORA", "r": 2}),
        ("gathered", {"peft_type": "LORA", "r": 2}),
        ("gathered", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}),
    ],
)
def test_a_compiled_bank_is_not_compiled_again_for_a_selection_or_an_expert(form, arguments):
    from torch._dynamo.testing import CompileCounter

    experts = random_experts(small_backbone(), [arguments] * 4)
    bank = bank_of(experts[:2], form)
    bank.reserve(4)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(bank, backend=counter, fullgraph=True)
    with torch.no_grad():
        for added, selection in ((0, [0, 1, 0]), (0, [1, 1, 0]), (1, [2, 0, 1]), (1, [3, 2, 3])):
            bank.extend(experts[len(bank) : len(bank) + added])
            selection = torch.tensor(selection)
            torch.testing.assert_close(compiled(images(3), selection), bank(images(3), selection), **TOLERANCE)
    assert counter.frame_count == 1


def test_old_outputs_stay_bit_identical_while_a_bank_grows():
    experts = random_experts(small_backbone(), [{"peft_type": "LORA", "r": 1}] * 40)
    bank, selection = bank_of(experts[:1]), torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        before = bank(images(5), selection)
        for expert in experts[1:]:
            bank.extend([expert])
            assert torch.equal(bank(images(5), selection), before)


def test_a_bank_gives_its_experts_back_as_they_came():
    arguments = [{"peft_type": "LORA", "r": rank, "lora_alpha": 3} for rank in (1, 5, 2)]
    experts = random_experts(small_backbone(), arguments)
    for given_in, given_back in zip(experts, bank_of(experts), strict=True):
        assert given_back.config == given_in.config and given_back.tensors.keys() == given_in.tensors.keys()
        assert all(torch.equal(given_back.tensors[key], given_in.tensors[key]) for key in given_in.tensors)


def test_neither_a_forward_nor_a_failed_one_leaves_a_trace_on_the_backbone():
    bank = bank_of(random_experts(small_backbone(), [{"peft_type": "LORA", "r": 1}] * 2))
    with pytest.raises(ValueError, match="channel"):
        bank(torch.zeros(2, 1, SIZE, SIZE), torch.tensor([0, 1]))
    with torch.no_grad():
        bank(images(2), torch.tensor([0, 1]))
        assert torch.equal(bank.backbone(images(2)), small_backbone()(images(2)))


def test_fewer_layers_give_the_features_behind_them():
    bank = bank_of(random_experts(small_backbone(), [{"peft_type": "LORA", "r": 1}] * 2))
    model = bank.backbone.model
    with torch.no_grad():
        tokens = model(pixel_values=images(3), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(bank.frozen(images(3), layers=1), model.layernorm(tokens)[:, 0])
        selection = torch.tensor([0, 1, 0])
        short, whole = (bank(images(3), selection, layers=layers) for layers in (1, 2))
        assert not torch.allclose(short, bank.frozen(images(3), layers=1))
        torch.testing.assert_close(whole, bank(images(3), selection))


@pytest.mark.parametrize(
    "other",
    [
        {"peft_type": "LORA", "r": 1, "target_modules": ["fc1"]},
        {"peft_type": "LORA", "r": 1, "use_dora": True},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "own", [{"peft_type": "LORA", "r": 1}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}]
)
def test_an_expert_of_another_make_is_refused(own, other):
    if own["peft_type"] == other["peft_type"] == "PROMPT_TUNING":
        return  # prompts of any length go together
    backbone = small_backbone()
    bank = bank_of(random_experts(backbone, [own]))
    with pytest.raises(ExpertError, match="does not fit a bank with"):
        bank.extend([replace(random_experts(backbone, [other])[0], name="other")])
    assert len(bank) == 1 and len(bank.table) == 1


def test_several_experts_for_one_image_need_a_fused_form():
    bank = bank_of(random_experts(small_backbone(), [TECHNIQUES["ia3"]] * 2))
    with pytest.raises(ExpertError, match="need LoRA, or prompts of one length"):
        bank(images(1), torch.tensor([[0, 1]]))


def test_grouped_experts_run_beside_one_in_training():
    bank = bank_of(random_experts(small_backbone(), [TECHNIQUES["ia3"]] * 2))
    selection = torch.tensor([0, 1])
    before = bank(images(2), selection)
    slot = bank.start("new", make_peft_config(TECHNIQUES["ia3"], bank.backbone))
    for parameter in slot.parameters():
        parameter.data += parameter.requires_grad
    trained = slot(pixel_values=images(2)).last_hidden_state[:, 0]
    assert torch.equal(bank(images(2), selection), before) and not torch.allclose(trained, before, atol=0.1)
    assert torch.equal(bank.frozen(images(2)), small_backbone()(images(2)))
    bank.finish("new")
    torch.testing.assert_close(bank(images(2), torch.tensor([2, 2])), trained, **TOLERANCE)
    assert torch.equal(bank(images(2), selection), before)


def test_a_copy_of_a_bank_runs_by_itself():
    bank = bank_of(random_experts(small_backbone(), [{"peft_type": "LORA", "r": 2}] * 2))
    selection = torch.tensor([0, 1])
    with torch.no_grad():
        before, twin = bank(images(2), selection), copy.deepcopy(bank)
        bank.table.rows.zero_()
        assert torch.equal(twin(images(2), selection), before)


def test_an_unknown_form_and_a_name_that_is_taken_are_refused():
    experts = random_experts(small_backbone(), [{"peft_type": "LORA", "r": 1}])
    with pytest.raises(ExpertError, match="form='stackd' is not one of"):
        bank_of(experts, "stackd")
    with pytest.raises(ExpertError, match="'expert-0' already"):
        bank_of(experts * 2)


@pytest.mark.parametrize(
    "arguments",
    [
        [{"peft_type": "LORA", "r": rank} for rank in (1, 3, 2)],
        [{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}] * 3,
        [TECHNIQUES["ia3"]] * 3,
    ],
    ids=["lora", "prompts", "ia3"],
)
def test_a_removed_expert_is_gone_and_the_others_answer_as_before(arguments):
    experts = random_experts(small_backbone(), arguments)
    bank = bank_of(experts)
    with torch.no_grad():
        before = bank(images(4), torch.tensor([0, 2, 1, 1]))
        bank.remove("expert-1")
        # In groups of the same sizes, whose rounding is the same.
        assert torch.equal(bank(images(4), torch.tensor([0, 1, 1, 1]))[:1], before[:1])
        bank.extend([replace(experts[1], name="again")])
        assert torch.equal(bank(images(4), torch.tensor([0, 1, 2, 2])), before)
    assert bank.names == ["expert-0", "expert-2", "again"]
    bank.remove("again")
    bank.remove("expert-0")
    bank.remove("expert-2")
    other = random_experts(small_backbone(), [TECHNIQUES["vera"]])  # an empty bank takes any kind
    bank.extend(other)
    with torch.no_grad():
        zeros = torch.zeros(4, dtype=torch.int64)
        assert torch.equal(bank(images(4), zeros), bank_of(other)(images(4), zeros))
    bank.remove("expert-0")
    bank.extend([replace(experts[0], name="first"), replace(experts[2], name="third")])
    weights = {tensor.sum().item() for tensor in bank.state_dict().values() if tensor.is_floating_point()}
    assert not weights & {tensor.sum().item() for tensor in experts[1].tensors.values()}
