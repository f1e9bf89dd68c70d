"""LoRA updates that add up: an expert trained on top of others, InfLoRA and SD-LoRA, against naive computations."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKBONE, make_trainer
from test_bank import bank_of, images, peft_with, random_experts, small_backbone
from torch.nn.functional import cross_entropy

from hf_clpeft import (
    Batch,
    ConfigError,
    ContinualModel,
    Expert,
    ExpertError,
    inflora,
    load_benchmark,
    sd_lora,
)
from hf_clpeft.experts.expert import ADAPTER, make_peft_config
from hf_clpeft.methods.inflora import complement, principal
from hf_clpeft.methods.inputs import combine_tokens, second_moments


pytestmark = pytest.mark.usefixtures("shallow")


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


def test_a_bank_that_grew_is_trimmed_to_the_bits_of_one_that_was_loaded():
    experts = random_experts(small_backbone(), [{"peft_type": "LORA", "r": 3}] * 5)
    loaded, grown = bank_of(experts), bank_of(experts[:1])
    for expert in experts[1:]:
        grown.extend([expert])
    assert len(grown.table.rows) > len(loaded.table.rows)
    grown.trim()
    assert grown.table.rows.shape == loaded.table.rows.shape
    every = torch.arange(5).expand(3, -1)
    assert torch.equal(grown(images(3), every), loaded(images(3), every))
    grown.extend([Expert("more", experts[0].config, experts[0].tensors)])
    torch.testing.assert_close(grown(images(3), torch.tensor([5] * 3)), loaded(images(3), torch.tensor([0] * 3)))


def test_only_plain_lora_can_be_trained_on_top_of_others():
    bank = bank_of(random_experts(small_backbone(), [{"peft_type": "LORA", "r": 2, "use_dora": True}]))
    bank.start("new", bank[0].config)
    with pytest.raises(ExpertError, match="plain LoRA on linear layers"):
        bank.under_training(images(1), torch.tensor([[0]]))


# Methods

RATES = SimpleNamespace(learning_rate=0.01, head_learning_rate=0.01)


def pictures(task, count=12):
    """Images of a task whose patches lie in few directions, and their labels."""
    generator = torch.Generator().manual_seed(task)
    patterns = torch.randn(3, 3, 32, 32, generator=generator)
    pixels = torch.einsum("ni,icxy->ncxy", torch.randn(count, 3, generator=generator), patterns)
    return pixels, torch.arange(count) % 2


def features_of_task(task):
    pixels, labels = pictures(task)
    return lambda features: (torch.cat([features(part).float() for part in pixels.split(5)]), labels + 2 * task)


def learn(model, task, steps=4):
    """Learns a task with the plain API."""
    model.start_task(f"task-{task:03d}", [f"{task} a", f"{task} b"], seed=0)
    model.method.prepare(features_of_task(task))
    optimizer = torch.optim.AdamW(model.method.parameter_groups(RATES), weight_decay=0)
    pixels, labels = pictures(task)
    for _ in range(steps):
        optimizer.zero_grad()
        model.method.loss(Batch(pixels, labels + 2 * task)).mean().backward()
        optimizer.step()


def learnt(method, tasks=2):
    model = ContinualModel.from_backbone(BACKBONE, method)
    for task in range(tasks):
        learn(model, task)
        model.finish_task(features_of_task(task), 12)
    return model


def dense_features(model, pixels, updates):
    """Features of the backbone with updates added to its weights."""
    weights = {
        key: model.backbone.model.get_submodule(key.removeprefix("base_model.model.")).weight for key in updates
    }
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    with torch.no_grad():
        for key, weight in weights.items():
            weight += updates[key]
        features = model.backbone(pixels)
        for key, weight in weights.items():
            weight.copy_(before[key])
    return features


def update_in_training(method, key):
    layer = method.bank.slot.peft_model.get_submodule(key)
    return (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight).detach()


@pytest.mark.parametrize("method", [inflora(r=3), sd_lora(r=2)], ids=lambda method: method.name)
def test_the_updates_of_all_tasks_are_added_up(method):
    model = learnt(method, tasks=3)
    updates = naive_updates(model.bank)
    total = {key: sum(update[key] for update in updates) for key in updates[0]}
    assert all(update.norm() > 0.01 for update in total.values())
    pixels = pictures(5)[0]
    with torch.no_grad():
        output = model(pixels)
        features = dense_features(model, pixels, total)
        weights = torch.cat([*model.method.heads.weights]), torch.cat([*model.method.heads.biases])
        torch.testing.assert_close(output.logits, torch.nn.functional.linear(features, *weights), atol=1e-3, rtol=1e-4)
        alone = torch.cat([model(pixels[row : row + 1]).logits for row in range(4)])
    torch.testing.assert_close(alone, output.logits[:4], atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="applies all experts to every image"):
        model.method.choose("task-000")


@pytest.mark.parametrize("method", [inflora(r=3), sd_lora(r=2)], ids=lambda method: method.name)
def test_the_loss_is_over_the_classes_of_the_task_with_all_updates(method):
    model = learnt(method, tasks=2)
    learn(model, 2)
    method, (pixels, labels) = model.method, pictures(2)
    updates, factors = naive_updates(model.bank), method.factors()
    total = {}
    for number, key in enumerate(updates[0]):
        total[key] = update_in_training(method, key)
        for index, update in enumerate(updates):
            total[key] = total[key] + (1 if factors is None else factors[index, number].detach()) * update[key]
    with torch.no_grad():
        wanted = cross_entropy(method._head(dense_features(model, pixels, total)), labels, reduction="none")
        torch.testing.assert_close(method.loss(Batch(pixels, labels + 4)), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("method", [inflora(), sd_lora()], ids=lambda method: method.name)
def test_five_tasks_are_learnt_in_sequence_and_not_forgotten(method, tmp_path):
    options = {"num_train_epochs": 4, "train_batch_size": 16, "eval_batch_size": 128}
    stream = load_benchmark("digits", max_train_samples_per_task=96, max_test_samples_per_task=64)
    report = make_trainer(method, tmp_path, **options).learn_stream(stream)
    assert sum(report.accuracy_matrix[-1]) / 5 > 0.5  # 0.2 if all but the last are forgotten


@pytest.mark.parametrize("method", [inflora(r=3), sd_lora(r=2)], ids=lambda method: method.name)
def test_a_task_that_fails_at_its_end_leaves_all_as_it_was(method):
    model = learnt(method)
    pixels = pictures(5)[0]
    with torch.no_grad():
        before, rows = model(pixels).logits, model.bank.table.rows.clone()
    state = {name: tensor.clone() for name, tensor in model.method.state().items()}
    learn(model, 2)
    with ThreadPoolExecutor() as threads:  # others go on predicting with what was there before
        assert torch.equal(threads.submit(torch.no_grad()(model), pixels).result().logits, before)
    model.finish_task(features_of_task(2), 12)
    model.method.undo()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, before)
    assert torch.equal(model.bank.table.rows[: len(rows)], rows)
    after = model.method.state()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("make", [inflora, sd_lora], ids=lambda make: make.name)
def test_updates_that_cannot_be_added_up_are_refused(make):
    for lora in ({"use_dora": True}, {"rank_pattern": {"layers.0.attention.q_proj": 4}}):
        with pytest.raises(ConfigError, match=f"{next(iter(lora))} cannot be used in {make.name}"):
            make(lora=lora)
    with pytest.raises(ConfigError, match="r=0 must be"):
        make(r=0)
    model = ContinualModel.from_backbone(BACKBONE, make(lora={"target_modules": ["projection"]}))
    with pytest.raises(ConfigError, match="Choose a vision transformer, or other target_modules"):
        model.start_task("a", ["b", "c"])
    with pytest.raises(ConfigError, match="a single class"):
        model.start_task("a", ["b"])


# SD-LoRA


def test_old_directions_stay_and_their_magnitudes_are_learnt():
    model = learnt(sd_lora(r=2))
    method = model.method
    before, norms = naive_updates(model.bank), model.bank.table.norms()
    learn(model, 2)
    magnitudes = method._magnitudes.detach().clone()
    assert magnitudes.shape == norms.shape and not torch.allclose(magnitudes, norms, rtol=1e-3)
    new = [update_in_training(method, key) for key in before[0]]
    groups = method.parameter_groups(RATES)
    assert any(parameter is method._magnitudes for parameter in groups[0]["params"])
    assert method.costs()[0] == magnitudes.numel() + sum(
        weight.numel() for weight in method.bank.slot.parameters() if weight.requires_grad
    )
    model.finish_task(features_of_task(2), 12)
    *after, last = naive_updates(model.bank)
    for index, (old, now) in enumerate(zip(before, after, strict=True)):
        for number, key in enumerate(old):
            wanted = magnitudes[index, number] * old[key] / old[key].norm()
            torch.testing.assert_close(now[key], wanted, atol=1e-6, rtol=1e-4)
    for key, update in zip(last, new, strict=True):
        torch.testing.assert_close(last[key], update)
    assert not method.state() and not any(name.startswith("_m") for name, _ in method.named_parameters())


# InfLoRA


def token_matrix(model, task, run):
    """Σ x xᵀ of the inputs of all adapted layers of the backbone, without a shortcut."""
    inputs = {}
    slot = model.bank.slot.peft_model
    hooks = [
        slot.get_submodule(key).register_forward_pre_hook(
            lambda _, args, key=key: inputs.setdefault(key, []).append(args[0].double())
        )
        for key in model.method.bank.table.sites
    ]
    with torch.no_grad():
        run(pictures(task)[0])
    for hook in hooks:
        hook.remove()
    return {key: torch.einsum("btx,bty->xy", x[0], x[0]) for key, x in inputs.items()}


def test_second_moments_are_unbiased_and_exact_with_as_many_combinations_as_tokens():
    layer = torch.nn.Linear(5, 2)
    tokens = torch.randn(7, 6, 5)
    exact = torch.einsum("btx,bty->xy", tokens, tokens).double()

    def features_of(rows):
        def call(features):
            return torch.cat([features(tokens[part]) for part in rows]), None

        return call

    def moments(combinations, seed=0, rows=(slice(None),)):
        return second_moments([layer], layer, features_of(rows), combinations, seed)[0]

    torch.testing.assert_close(moments(8), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moments(1_000), exact, atol=1e-4, rtol=1e-4)
    for combinations in (1, 3):
        mean = sum(moments(combinations, seed) for seed in range(1_000)) / 1_000
        torch.testing.assert_close(mean, exact, atol=0.1 * float(exact.norm()), rtol=0)
        assert not torch.allclose(moments(combinations, 0), moments(combinations, 1))
        parts = [slice(4, 7), slice(0, 1), slice(1, 4)]  # neither batches nor order matter
        torch.testing.assert_close(moments(combinations, rows=parts), moments(combinations), atol=1e-4, rtol=1e-4)


def test_more_combinations_of_tokens_come_nearer():
    tokens = torch.randn(64, 16, 4)
    exact = torch.einsum("btx,bty->bxy", tokens, tokens)
    errors = []
    for count in (1, 4, 16):
        rows = combine_tokens(tokens, torch.arange(64), count)
        assert rows.shape == (64, count, 4)
        errors.append(float((rows.mT @ rows - exact).norm()))
    assert errors[0] > 1.5 * errors[1] > 100 * errors[2]


def test_a_is_the_top_of_what_is_new_and_orthogonal_to_what_is_old():
    model = learnt(inflora(r=3, combinations=1_000), tasks=2)
    method = model.method
    learn(model, 2, steps=0)
    exact = token_matrix(model, 2, method.features)
    for key, site in model.bank.table.sites.items():
        width = exact[key].shape[0]
        old = complement(method.rest(site.input, width))
        assert 0 < len(old) < width / 2
        a = method.bank.slot.peft_model.get_submodule(key).lora_A[ADAPTER].weight
        torch.testing.assert_close(a @ a.T, torch.eye(3) / 3, atol=1e-5, rtol=0)
        assert (a.double() @ old.T).abs().max() < 1e-6
        part = exact[key] - old.T @ old @ exact[key]
        top = torch.linalg.svd(part).U[:, :3].T / 3**0.5
        torch.testing.assert_close(a.T @ a, (top.T @ top).float(), atol=1e-3, rtol=0)


def test_new_updates_change_nothing_for_inputs_of_old_tasks():
    model = learnt(inflora(r=3), tasks=2)
    bases = [complement(model.method.rest(*pair)) for pair in enumerate([128] * len(model.bank.table.inputs))]
    learn(model, 2, steps=8)
    model.finish_task(features_of_task(2), 12)
    update = naive_updates(model.bank)[-1]
    for key, site in model.bank.table.sites.items():
        old = bases[site.input].float()
        assert update[key].norm() > 0.01
        assert (update[key] @ old.T).norm() < 1e-5 * update[key].norm()


def test_bases_grow_as_in_gpm_and_the_smaller_of_both_is_stored():
    model = learnt(inflora(r=3, threshold=0.6, last_threshold=0.999, sessions=3, combinations=1_000), tasks=0)
    method, spaces = model.method, {}
    for task, threshold in enumerate((0.6, 0.6 + 0.399 / 3, 0.6 + 2 * 0.399 / 3, 0.6 + 2 * 0.399 / 3)):
        learn(model, task)
        if task == 0:
            matrices = dict(enumerate(method._matrices(features_of_task(0))))
        else:
            exact = token_matrix(model, task, method.features)
            matrices = {site.input: exact[key] for key, site in model.bank.table.sites.items()}
        for number, matrix in matrices.items():
            space = spaces.get(number, torch.zeros(len(matrix), 0, dtype=torch.float64))
            total, kept = matrix.square().sum(), (space @ space.T @ matrix).square().sum()
            part = torch.linalg.svd(matrix - space @ space.T @ matrix)
            more = 0
            while kept < threshold * total:
                kept, more = kept + part.S[more] ** 2, more + 1
            spaces[number] = torch.cat([space, part.U[:, :more]], dim=1)
        model.finish_task(features_of_task(task), 12)
        for number, space in spaces.items():
            width = len(space)
            rest = method.rest(number, width)
            assert len(rest) == width - space.shape[1]
            torch.testing.assert_close(torch.eye(width).double() - rest.T @ rest, space @ space.T, atol=2e-2, rtol=0)
            assert method.bases[number].shape == (min(len(rest), width - len(rest)), width)
            assert bool(method.of_rest[number]) == (2 * len(rest) <= width)


def test_a_basis_of_the_rest_spans_the_same():
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    matrix = torch.randn(8, 8, dtype=torch.float64)
    matrix = matrix @ matrix.T
    first, energies = principal(matrix, complement(basis[:3]))
    second, others = principal(matrix, basis[3:])
    torch.testing.assert_close(energies, others)
    torch.testing.assert_close(first.T @ first, second.T @ second)
    torch.testing.assert_close(energies, torch.linalg.svd(basis[3:] @ matrix).S ** 2)
    nothing, none = principal(matrix, basis[:0])
    assert nothing.shape == (0, 8) and none.shape == (0,)


def test_a_layer_whose_inputs_are_all_used_learns_nothing_more():
    model = learnt(inflora(r=3), tasks=1)
    nothing = [torch.nn.Parameter(torch.zeros(0, 128), requires_grad=False) for _ in model.method.bases]
    model.method.bases, model.method.of_rest = torch.nn.ParameterList(nothing), torch.ones_like(model.method.of_rest)
    learn(model, 1)
    model.finish_task(features_of_task(1), 12)
    assert all(update.norm() == 0 for update in naive_updates(model.bank)[1].values())
    model.save_pretrained("all")
    assert torch.equal(ContinualModel.from_pretrained("all").method.of_rest, model.method.of_rest)


def test_bases_are_stored_and_checked(tmp_path):
    model = learnt(inflora(r=3))
    model.save_pretrained(tmp_path / "model")
    loaded = ContinualModel.from_pretrained(tmp_path / "model")
    assert [*loaded.method.state()] == [*model.method.state()]
    for name, tensor in model.method.state().items():
        assert torch.equal(loaded.method.state()[name], tensor)
    basis = loaded.method.bases[0].data
    for wrong in (2 * basis[:1], basis[:1].repeat(len(basis), 1), torch.full_like(basis, torch.nan)):
        loaded.method.bases[0].data = torch.cat([wrong, basis[len(wrong) :]])
        with pytest.raises(ConfigError, match="rows are not orthonormal"):
            loaded.method.check()
    loaded.method.bases = loaded.method.bases[1:]
    with pytest.raises(ConfigError, match="bases of the inputs of other layers"):
        loaded.method.check()


@pytest.mark.parametrize(
    "options", [{"threshold": 1.1}, {"last_threshold": -0.1}, {"sessions": 0}, {"combinations": 0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.* must be between"):
        inflora(**options)
