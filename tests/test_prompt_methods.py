"""DualPrompt and CODA-Prompt compute what their papers say, image by image, and keep what old tasks learnt."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, pattern_dataset, vouch
from safetensors.torch import load_file, save_file
from test_bank import TOLERANCE, images, small_backbone
from test_prefix import by_hand, states_of
from torch.nn.functional import cosine_similarity, cross_entropy

from hf_clpeft import (
    Batch,
    ConfigError,
    ContinualConfig,
    ContinualModel,
    ContinualTrainer,
    Expert,
    TaskStream,
    TrainerCallback,
    coda_prompt,
    dualprompt,
    load_benchmark,
)
from hf_clpeft.methods.coda_prompt import PARTS, orthonormal, overlap, weights_of
from hf_clpeft.methods.layers import scaled


pytestmark = pytest.mark.usefixtures("shallow")
OPTIONS = {
    "dualprompt": dualprompt(general_length=2, expert_length=3),
    "coda_prompt": coda_prompt(components=3, prefix_length=2),
}
LABELS = torch.tensor([0, 1, 1, 0])


def small_model(options):
    backbone = small_backbone()
    return ContinualModel(backbone, ContinualConfig(replace(options), backbone.config))


def learn(model, name, classes, steps=3, seed=0):
    """A task of random images, trained for a few large steps."""
    torch.manual_seed(seed)
    model.start_task(name, classes)
    method, pixels = model.method, images(4, seed)
    labels = torch.tensor(method.numbers)[LABELS]
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        method.loss(Batch(pixels, labels, method.query(pixels))).mean().backward()
        optimizer.step()
    with torch.no_grad():
        model.finish_task(lambda features: (features(pixels).float(), labels), num_train_images=4)
    return model


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


@pytest.mark.usefixtures("deep")
def test_layers_are_those_of_the_paper_in_proportion_to_the_depth():
    assert [(scaled(2, n), scaled(5, n)) for n in (1, 2, 6, 12, 24, 32)] == [
        (1, 1),
        (1, 1),
        (1, 3),
        (2, 5),
        (4, 10),
        (5, 13),
    ]
    method = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", dualprompt()).method
    assert (method.general_layers, method.expert_layers) == ([1], [2, 3])
    method = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", dualprompt(expert_layers=[4, 6])).method
    assert (method.general_layers, method.expert_layers) == ([1], [4, 6])
    method = small_model(dualprompt()).method
    assert (method.general_layers, method.expert_layers) == ([1], [2])
    assert ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", coda_prompt()).method.layers == [0, 1, 2]


@pytest.mark.parametrize(
    "make, values, message",
    [
        (dualprompt, {"general_length": 0}, "general_length"),
        (dualprompt, {"expert_length": 5000}, "expert_length"),
        (dualprompt, {"pull": -1.0}, "pull"),
        (dualprompt, {"general_layers": []}, r"general_layers=\[\] must be layers from 1"),
        (dualprompt, {"expert_layers": [3, 2]}, r"expert_layers=\[3, 2\] must be layers from 1"),
        (dualprompt, {"expert_layers": [0, 1]}, r"must be layers from 1"),
        (dualprompt, {"expert_layers": [9]}, r"expert_layers=\[9\], but the backbone has 2 layers"),
        (coda_prompt, {"components": 0}, "components"),
        (coda_prompt, {"prefix_length": 0}, "prefix_length"),
        (coda_prompt, {"orthogonality": -0.1}, "orthogonality"),
        (coda_prompt, {"layers": [1, 1]}, r"layers=\[1, 1\] must be layers from 1"),
        (coda_prompt, {"layers": [3]}, r"layers=\[3\], but the backbone has 2 layers"),
    ],
)
def test_options_that_cannot_be_are_refused(make, values, message):
    with pytest.raises(ConfigError, match=message):
        small_model(make(**values))


# DualPrompt


def test_dualprompt_reads_general_and_expert_prefixes_of_the_nearest_key():
    model = small_model(dualprompt(general_length=2, expert_length=3, general_layers=[1, 2], expert_layers=[2]))
    for number, classes in enumerate((["a", "b"], ["c", "d"], ["e", "f"])):
        learn(model, f"task-{number}", classes, seed=number)
    method, pixels = model.method, images(6, seed=9)
    with torch.no_grad():
        method.general.add_(0.5 * torch.randn(method.general.shape))
        query = method.query(pixels)
        routing = method.route(query)
        features = method.read(pixels, routing.selection)
        for row in range(6):
            cosines = cosine_similarity(query[row], method.router.keys)
            assert routing.selection[row] == cosines.argmax()
            torch.testing.assert_close(routing.distances[row], 1 - cosines)
            own = states_of(model.bank[int(cosines.argmax())])[1]
            prefixes = {0: method.general[0], 1: torch.cat([method.general[1], own], dim=1)}
            expected = by_hand(small_backbone().model, pixels[row : row + 1], prefixes)
            torch.testing.assert_close(features[row : row + 1], expected, **TOLERANCE)


def test_the_loss_of_dualprompt_is_masked_and_pulls_the_key_of_the_task_alone():
    model = learn(small_model(dualprompt(general_length=2, expert_length=3, pull=0.3)), "one", ["a", "b"])
    model.start_task("two", ["c", "d"])
    method, pixels = model.method, images(4, seed=3)
    with torch.no_grad():
        method._head.weight.normal_()
    expert = Expert.from_peft_model("two", model.bank.slot.peft_model)
    prefixes = {0: method.general[0], 1: states_of(expert)[1]}
    logits = by_hand(small_backbone().model, pixels, prefixes) @ method._head.weight.T
    query = method.query(pixels)
    pull = 1 - cosine_similarity(query, method._key[None])
    expected = cross_entropy(logits, LABELS, reduction="none") + 0.3 * pull
    found = method.loss(Batch(pixels, LABELS + 2, query))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    found.mean().backward()
    trained = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    slot = "bank.slot.peft_model.prompt_encoder.default.embedding.weight"
    assert trained == {"general", "_key", "_head.weight", "_head.bias", slot}


def test_every_expert_of_dualprompt_is_a_peft_adapter_that_starts_from_the_one_before(tmp_path):
    model = learn(small_model(OPTIONS["dualprompt"]), "one", ["a", "b"])
    first, general, key = model.bank[0], model.method.general.clone(), model.method.router.keys[0].clone()
    model.start_task("two", ["c", "d"])
    new = Expert.from_peft_model("two", model.bank.slot.peft_model)
    assert torch.equal(new.tensors["prompt_embeddings"], first.tensors["prompt_embeddings"])
    learn(model, "two", ["c", "d"], seed=1)
    assert torch.equal(model.bank[0].tensors["prompt_embeddings"], first.tensors["prompt_embeddings"])
    assert not torch.equal(model.bank[1].tensors["prompt_embeddings"], first.tensors["prompt_embeddings"])
    assert torch.equal(model.method.router.keys[0], key) and not torch.equal(model.method.general, general)
    model.save_pretrained(tmp_path)
    loaded = Expert.load("two", tmp_path / "experts" / "two")
    assert (loaded.config.peft_type, loaded.config.layers_to_transform) == ("PREFIX_TUNING", [1])
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "method.safetensors").items()} == {
        "general": (1, 2, 2, 16)
    }
    assert load_file(tmp_path / "router.safetensors")["keys"].shape == (2, 16)


# CODA-Prompt


def test_weights_are_cosines_of_attended_queries():
    query, keys, attention = torch.randn(3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    found = weights_of(query, keys, attention)
    for image in range(3):
        for layer in range(2):
            for number in range(4):
                attended = query[image] * attention[layer, number]
                expected = attended @ keys[layer, number] / attended.norm() / keys[layer, number].norm()
                torch.testing.assert_close(found[image, layer, number], expected)
    assert not weights_of(torch.zeros(1, 5), keys, attention).any()  # no image is without an answer


def test_overlap_is_the_mean_square_distance_from_orthonormal_rows():
    rows = torch.randn(2, 3, 5)
    expected = 0.0
    for layer in rows:
        gram = [[float(one @ other) - (i == j) for j, other in enumerate(layer)] for i, one in enumerate(layer)]
        expected += sum(value**2 for row in gram for value in row) / 9
    torch.testing.assert_close(overlap(rows), torch.tensor(expected))
    assert overlap(torch.eye(5)[None, :3]) == 0


def test_new_rows_are_orthogonal_to_old_ones_as_long_as_there_is_room():
    known = torch.randn(2, 3, 8)
    new = orthonormal(known, 4)
    torch.testing.assert_close(new @ new.mT, torch.eye(4).expand(2, -1, -1), **TOLERANCE)
    assert (new @ known.mT).abs().max() < 1e-5
    torch.testing.assert_close(orthonormal(known, 6).norm(dim=-1), torch.ones(2, 6))
    assert overlap(orthonormal(known[:, :0], 8)) < 1e-9
    assert not torch.equal(orthonormal(known, 4), new)


def prompts_of(method, parts, query):
    """Prefixes by layer of one image."""
    found = {}
    for number, layer in enumerate(method.layers):
        total = torch.zeros(2 * method.options.prefix_length * 16)
        for prompt, key, attention in zip(*(part[number] for part in parts), strict=True):
            total += cosine_similarity(query * attention, key, dim=0) * prompt
        found[layer] = total.view(2, method.options.prefix_length, 16)
    return found


def test_coda_prompt_reads_the_sum_of_all_components():
    model = small_model(coda_prompt(components=3, prefix_length=2, layers=[1, 2]))
    for number, classes in enumerate((["a", "b"], ["c", "d"])):
        learn(model, f"task-{number}", classes, seed=number)
    method, pixels = model.method, images(4, seed=9)
    method.prompts *= 20  # so that they matter
    parts = [getattr(method, part) for part in PARTS]
    assert [tuple(part.shape) for part in parts] == [(2, 6, 64), (2, 6, 16), (2, 6, 16)]
    with torch.no_grad():
        query = method.query(pixels)
        features = method.read(pixels, torch.zeros(4).long(), query)
        frozen = method.bank.frozen(pixels)
        for row in range(4):
            prefixes = prompts_of(method, parts, query[row])
            expected = by_hand(small_backbone().model, pixels[row : row + 1], prefixes)
            torch.testing.assert_close(features[row : row + 1], expected, **TOLERANCE)
        assert not torch.allclose(features, frozen, atol=0.01)
        torch.testing.assert_close(model(pixels).logits, method.heads(features, torch.zeros(4).long()))


def test_the_loss_of_coda_prompt_trains_new_components_beside_the_frozen_ones():
    model = learn(small_model(coda_prompt(components=3, prefix_length=2, orthogonality=0.7)), "one", ["a", "b"])
    before = [getattr(model.method, part).clone() for part in PARTS]
    torch.manual_seed(5)
    model.start_task("two", ["c", "d"])
    method, pixels = model.method, images(4, seed=3)
    with torch.no_grad():
        method._head.weight.normal_()
    for old, new in zip(before, method._new, strict=True):
        assert (new @ old.mT).abs().max() < 1e-5  # Gram-Schmidt
    parts, query = [torch.cat(pair, dim=1) for pair in zip(before, method._new, strict=True)], method.query(pixels)
    features = [
        by_hand(small_backbone().model, pixels[row : row + 1], prompts_of(method, parts, query[row]))
        for row in range(4)
    ]
    logits = torch.cat(features) @ method._head.weight.T
    penalty = sum((part[0] @ part[0].T - torch.eye(6)).square().mean() for part in parts)
    found = method.loss(Batch(pixels, LABELS + 2, query))
    torch.testing.assert_close(found, cross_entropy(logits, LABELS, reduction="none") + 0.7 * penalty, **TOLERANCE)
    found.mean().backward()
    trained = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert trained == {"_new.0", "_new.1", "_new.2", "_head.weight", "_head.bias"}
    assert all(parameter.grad.any() for parameter in method._new)
    learn(model, "two", ["c", "d"], seed=5)
    for part, old in zip(PARTS, before, strict=True):
        assert torch.equal(getattr(model.method, part)[:, :3], old)


@pytest.mark.usefixtures("deep")
def test_a_file_with_other_components_is_refused(tmp_path):
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", coda_prompt(components=2))
    pixels = torch.randn(4, 3, 32, 32)
    model.start_task("one", ["a", "b"])
    model.finish_task(lambda features: (features(pixels), LABELS), num_train_images=4)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "method.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "prompts": (3, 2, 2 * 4 * 128),
        "keys": (3, 2, 128),
        "attention": (3, 2, 128),
    }
    save_file(tensors | {"keys": torch.zeros(3, 5, 128)}, tmp_path / "method.safetensors")
    vouch(tmp_path)
    with pytest.raises(ConfigError, match="method.safetensors has 5 keys, not 2"):
        ContinualModel.from_pretrained(tmp_path, backbone=model.backbone)


# Both


def test_images_are_judged_one_by_one_with_two_forward_passes(options):
    model = small_model(options)
    for number, classes in enumerate((["a", "b"], ["c", "d"], ["a", "d"])):  # classes come back
        learn(model, f"task-{number}", classes, seed=number)
    passes = []
    hook = model.backbone.model.register_forward_hook(lambda *call: passes.append(len(call[2].last_hidden_state)))
    with torch.no_grad():
        together = model(images(6, seed=7)).logits
        hook.remove()
        alone = torch.cat([model(images(6, seed=7)[row : row + 1]).logits for row in range(6)])
        back = model(images(6, seed=7).flip(0)).logits.flip(0)
    assert passes == [6, 6] and together.shape == (6, 4)
    torch.testing.assert_close(together, alone, **TOLERANCE)
    torch.testing.assert_close(together, back, **TOLERANCE)


def test_what_it_cannot_do_it_says(options):
    model = learn(small_model(options), "one", ["a", "b"])
    with pytest.raises(ConfigError, match="exactly"):
        model.remove("one")
    with pytest.raises(ConfigError, match=f"is of the method {options.name}"):
        model.method.alike()
    with pytest.raises(ConfigError, match="single class"):
        model.start_task("two", ["c"])


def test_a_failed_task_leaves_everything_as_it_was(options):
    model = learn(small_model(options), "one", ["a", "b"])
    before = {name: tensor.clone() for name, tensor in model.method.state_dict().items()}
    answers = model(images(3)).logits
    with pytest.raises(ZeroDivisionError), model.method.learning():
        learn_and_fail(model)
    after = model.method.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(images(3)).logits, answers)
    learn(model, "two", ["c", "d"])


def learn_and_fail(model):
    model.start_task("two", ["c", "d"])
    method, pixels = model.method, images(4)
    method.loss(Batch(pixels, LABELS + 2, method.query(pixels))).mean().backward()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1.0 * parameter.requires_grad)
    raise ZeroDivisionError


class Look(TrainerCallback):
    """Lets another thread predict in the middle of the second task."""

    def __init__(self):
        self.found = []

    def on_step_end(self, model, step, num_steps):
        if (model.method.task.name, step) == ("task-001", 3):
            thread = threading.Thread(target=self.look, args=(model,))
            thread.start()
            thread.join()

    def look(self, model):
        try:
            with torch.no_grad():
                self.found.append(model(torch.zeros(1, 3, 32, 32)).logits.shape)
        except Exception as error:
            self.found.append(type(error).__name__)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("name, seen", {"dualprompt": "ExpertError", "coda_prompt": (1, 2)}.items())
def test_it_learns_domains_in_half_precision_and_comes_back_to_the_bit(name, seen, other_precision):
    domains = pattern_dataset(2, per_class=8, domains=["plain", "negative"])
    stream, look = TaskStream.domain_incremental(domains, domain_column="domain"), Look()
    trainer = make_trainer(OPTIONS[name], num_train_epochs=6, mixed_precision="bf16", learning_rate=0.02)
    trainer = ContinualTrainer(trainer.model, trainer.args, callbacks=[look])
    report = trainer.learn_stream(stream)
    assert report.summary()["average_accuracy"] > 0.7 and look.found == [seen]
    loaded = ContinualModel.from_pretrained("out")
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, trainer.model(pixels).logits)
    assert "prefix" in Path("out/README.md").read_text()


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("name", OPTIONS)
def test_it_forgets_far_less_than_one_adapter_for_all(name):
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=24)
    method = {"dualprompt": dualprompt(), "coda_prompt": coda_prompt()}[name]
    report = make_trainer(method, num_train_epochs=4, train_batch_size=16).learn_stream(stream)
    assert report.summary()["average_accuracy"] > 0.5  # sequential LoRA: 0.2
