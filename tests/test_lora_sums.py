"""LoRA updates that add up: an expert trained on top of others, InfLoRA and SD-LoRA, against naive computations."""

import pytest
import torch
from test_bank import bank_of, images, peft_with, random_experts, small_backbone

from hf_clpeft import Expert, ExpertError
from hf_clpeft.experts.expert import ADAPTER, make_peft_config


def naive_updates(bank):
    """`s B A` of every expert, by layer."""
    updates = []
    for index, expert in enumerate(bank):
        scale = float(bank.table.scales[bank.table.rows_of(index)[0]])
        updates.append(
            {
                key: scale * expert.tensors[f"{key}.lora_B.weight"] @ expert.tensors[f"{key}.lora_A.weight"]
                for key in bank.table.sites
            }
        )
    return updates


# The bank and its slot


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "fc1", "fc2"]], ids="-".join)
@pytest.mark.parametrize("selection", [[[0, 1, 2]] * 4, [[2, 0], [0, 1], [1, 2], [0, 2]], [1, 0, 2, 2]], ids=str)
def test_an_expert_trained_on_top_of_others_is_what_peft_gives_with_all_of_them(targets, selection):
    ranks = [(2, 2), (1, 4), (3, 3), (2, 2)]
    arguments = [{"peft_type": "LORA", "r": r, "lora_alpha": a, "target_modules": targets} for r, a in ranks]
    *below, new = random_experts(small_backbone(), arguments)
    bank = bank_of(below)
    slot = bank.start("new", new.config)
    new.copy_to(slot)
    factors = torch.rand(3, len(bank.table.sites), generator=torch.Generator().manual_seed(0)).requires_grad_()
    probe = torch.randn(4, 16)
    features = bank.under_training(images(4), torch.tensor(selection), factors)
    (features * probe).sum().backward()

    scaled = [Expert(expert.name, expert.config, dict(expert.tensors)) for expert in below]
    for expert, row in zip(scaled, factors.detach(), strict=True):
        for key, factor in zip(bank.table.sites, row, strict=True):
            expert.tensors[f"{key}.lora_B.weight"] = factor * expert.tensors[f"{key}.lora_B.weight"]
    reference = peft_with([*scaled, new])
    expected = []
    for image, chosen in enumerate(selection):
        names = [below[index].name for index in (chosen if isinstance(chosen, list) else [chosen])]
        reference.base_model.set_adapter([*names, new.name])
        feature = reference(pixel_values=images(4)[image : image + 1]).last_hidden_state[:, 0]
        (feature * probe[image]).sum().backward()
        expected.append(feature.detach())
    torch.testing.assert_close(features.detach(), torch.cat(expected), atol=1e-5, rtol=0)
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    for name, weight in slot.named_parameters():
        if weight.requires_grad:
            wanted = gradients[name.replace(f".{ADAPTER}.", f".{new.name}.")]
            torch.testing.assert_close(weight.grad, wanted, atol=1e-5, rtol=1e-4)
    for index, expert in enumerate(below):
        for number, key in enumerate(bank.table.sites):
            name = f"{key}.lora_B.weight"
            gradient = gradients[name.replace(".weight", f".{expert.name}.weight")]
            wanted = (gradient * expert.tensors[name]).sum()
            torch.testing.assert_close(factors.grad[index, number], wanted, atol=1e-5, rtol=1e-4)
    assert bank.table.rows.grad is None


def test_a_factor_for_each_expert_is_one_for_all_its_layers():
    bank = bank_of(random_experts(small_backbone(), [{"peft_type": "LORA", "r": 2}] * 2))
    bank.start("new", make_peft_config({"peft_type": "LORA", "r": 1}, bank.backbone))
    both, factors = torch.tensor([[0, 1]] * 3), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        plain = bank.under_training(images(3), both)
        torch.testing.assert_close(plain, bank(images(3), both))  # a fresh expert adds nothing
        by_layer = bank.under_training(images(3), both, factors[:, None].expand(-1, 4))
        assert torch.equal(bank.under_training(images(3), both, factors), by_layer)
        bank.rescale(factors)
        torch.testing.assert_close(bank(images(3), both), by_layer)


def test_norms_of_updates_are_those_of_the_products():
    arguments = [
        {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": ["q_proj", "fc2"]} for r in (1, 4, 2)
    ]
    bank = bank_of(random_experts(small_backbone(), arguments))
    wanted = [[update.norm() for update in updates.values()] for updates in naive_updates(bank)]
    torch.testing.assert_close(bank.table.norms(), torch.tensor(wanted))


def test_only_plain_lora_can_be_trained_on_top_of_others():
    bank = bank_of(random_experts(small_backbone(), [{"peft_type": "LORA", "r": 2, "use_dora": True}]))
    bank.start("new", bank[0].config)
    with pytest.raises(ExpertError, match="plain LoRA on linear layers"):
        bank.under_training(images(1), torch.tensor([[0]]))
