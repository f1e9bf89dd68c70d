"""TUNA: the surest expert of all tasks judges every image, together with one that is merged from all of them."""

import math

import pytest
import torch
from conftest import BACKBONE, make_trainer, outcome, pattern_dataset, vouch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, cross_entropy

from hf_clpeft import (
    Batch,
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    TaskStream,
    TrainerCallback,
    load_benchmark,
    s_lora,
    tuna,
)
from hf_clpeft.experts.expert import Expert, make_peft_config, make_peft_model
from hf_clpeft.methods.alignment import ClassGaussians
from hf_clpeft.methods.tuna import SCALE, elect, merge, overlap
from hf_clpeft.streams.images import open_image


pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)


@pytest.fixture(scope="module")
def trainer(stream, tmp_path_factory):
    trainer = make_trainer(tuna(), tmp_path_factory.mktemp("tuna"), learning_rate=1e-2)
    trainer.learn_stream(stream)
    return trainer


@pytest.fixture
def model(trainer, backbone):
    return ContinualModel.from_pretrained(trainer.args.output_dir, backbone=backbone)


def pixels_of(model, task, side):
    rows = list(getattr(task, side))
    resized = model.backbone.transform.resize([open_image(encoded) for encoded, _, _ in rows])
    numbers = [model.config.classes.index(task.classes[label]) for _, label, _ in rows]
    return model.backbone.transform.normalize(torch.from_numpy(resized)), torch.tensor(numbers)


@torch.no_grad()
def under(model, pixels, expert):
    return model.bank(pixels, torch.full((len(pixels),), expert))


def random_experts(backbone, count, r=2):
    generator = torch.Generator().manual_seed(0)
    config = make_peft_config({"peft_type": "LORA", "r": r, "lora_alpha": r}, backbone)
    blank = Expert.from_peft_model("blank", make_peft_model(backbone, config)).tensors
    return [
        Expert(
            f"task-{i:03d}",
            config,
            {key: torch.randn(tensor.shape, generator=generator) for key, tensor in blank.items()},
        )
        for i in range(count)
    ]


def updates_of(expert):
    downs = [key for key in expert.tensors if "lora_A" in key]
    return {key: expert.tensors[key.replace("lora_A", "lora_B")] @ expert.tensors[key] for key in downs}


def test_each_entry_has_the_elected_sign_and_the_largest_magnitude_of_that_sign():
    updates = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    updates[:, 0, 0] = 0
    elected = elect(updates)
    for i in range(4):
        for j in range(3):
            values = updates[:, i, j].tolist()
            sign = (sum(values) > 0) - (sum(values) < 0)
            assert elected[i, j] == sign * max((abs(value) for value in values if value * sign > 0), default=0.0)


def test_experts_are_merged_by_their_updates_into_the_nearest_of_their_rank(fresh_backbone):
    experts = random_experts(fresh_backbone, 3)
    merged = merge(experts)
    assert {key: tensor.shape for key, tensor in merged.tensors.items()} == {
        key: tensor.shape for key, tensor in experts[0].tensors.items()
    }
    every = [updates_of(expert) for expert in experts]
    for key, update in updates_of(merged).items():
        left, values, right = torch.linalg.svd(elect(torch.stack([of_expert[key] for of_expert in every])))
        nearest = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
        torch.testing.assert_close(update, nearest, atol=1e-3, rtol=1e-3)
    for key, update in updates_of(merge(experts[:1])).items():  # that of one expert is its own
        torch.testing.assert_close(update, every[0][key], atol=1e-4, rtol=1e-4)
    flipped = [Expert(e.name, e.config, {key: -tensor for key, tensor in e.tensors.items()}) for e in experts]
    for key, update in updates_of(merge(flipped)).items():  # the same updates from other factors
        torch.testing.assert_close(update, updates_of(merged)[key], atol=1e-4, rtol=1e-4)


def test_overlap_is_that_of_all_columns_with_those_of_all_earlier_experts():
    generator = torch.Generator().manual_seed(0)
    ups, one, two = ([torch.randn(5, 2, generator=generator) for _ in range(3)] for _ in range(3))
    expected = 0.0
    for layer in range(3):
        for earlier in (one, two):
            expected += sum(
                abs(float(ups[layer][:, i] @ earlier[layer][:, j])) / 3 for i in range(2) for j in range(2)
            )
    assert float(overlap(ups, [one, two])) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_a_cosine_cross_entropy_and_keeps_adapters_orthogonal(stream, model):
    model.config.method.orthogonality = 0.5
    model.start_task("more", ["a", "b"])
    method, pixels = model.method, pixels_of(model, stream[0], "train")[0][:3]
    with torch.no_grad():
        for name, parameter in method.bank.slot.peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    labels = torch.tensor([6, 7, 6])
    losses = method.loss(Batch(pixels, labels))
    features = method.bank.under_training(pixels)
    cosines = [[cosine_similarity(row, weight, dim=0) for weight in method._head.weight] for row in features]
    expected = cross_entropy(SCALE * torch.stack([torch.stack(row) for row in cosines]), labels - 6, reduction="none")
    ups = [p for name, p in method.bank.slot.peft_model.named_parameters() if "lora_B" in name]
    earlier = [[t for key, t in method.bank[i].tensors.items() if "lora_B" in key] for i in (1, 2, 3)]
    assert (term := float(0.5 * math.exp(-4) * overlap(ups, earlier).detach())) > 0
    torch.testing.assert_close(losses, expected + term)
    losses.mean().backward()
    assert all(up.grad.abs().sum() > 0 for up in ups)


def test_the_surest_expert_and_the_universal_one_judge_an_image_together(model, stream):
    pixels = torch.cat([pixels_of(model, task, "test")[0] for task in stream])
    with torch.no_grad():
        probabilities = model(pixels).logits.exp()
    read = [under(model, pixels, expert) for expert in range(4)]
    for image in range(len(pixels)):
        each = []
        for features in read:
            cosines = torch.stack([cosine_similarity(features[image], row, dim=0) for row in model.method.head])
            each.append((SCALE * cosines).softmax(dim=0))
        entropies = [-float((p * p.log()).sum()) for p in each[1:]]
        surest = each[1 + entropies.index(min(entropies))]
        torch.testing.assert_close(probabilities[image], (surest + each[0]) / 2)
    with torch.no_grad():
        alone = model(pixels, expert=2).logits
    expected = SCALE * cosine_similarity(read[2][:, None], model.method.head, dim=-1)
    torch.testing.assert_close(alone, expected.log_softmax(dim=-1))


def test_the_universal_expert_is_a_plain_adapter_merged_from_all(model, trainer, fresh_backbone):
    names = ["universal", "task-000", "task-001", "task-002"]
    assert model.bank.names == trainer.model.bank.names == model.config.expert_names == names
    merged = merge(list(model.bank)[1:])
    assert all(torch.equal(tensor, merged.tensors[key]) for key, tensor in model.bank[0].tensors.items())
    folder = f"{trainer.args.output_dir}/experts/universal"
    plain = PeftModel.from_pretrained(fresh_backbone.model, folder)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(under(model, pixels, 0), expected, atol=1e-4, rtol=1e-4)


def test_gaussians_are_those_of_each_class_with_the_expert_of_its_task(model, stream):
    expected = ClassGaussians(128)
    for position, task in enumerate(stream):
        pixels, numbers = pixels_of(model, task, "train")
        expected.learn(under(model, pixels, position + 1), numbers)
    torch.testing.assert_close(model.method.gaussians.means, expected.means)
    torch.testing.assert_close(model.method.gaussians.covariances, expected.covariances, atol=1e-4, rtol=1e-4)


def test_what_is_saved_comes_back_and_what_does_not_fit_is_refused(model, trainer, tmp_path, backbone):
    tensors = load_file(f"{trainer.args.output_dir}/method.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "head": (6, 128),
        "gaussians.means": (6, 128),
        "gaussians.factors": (6, 128, 128),
        "gaussians.counts": (6,),
        "gaussians.owners": (6,),
        "gaussians.classes": (6,),
    }
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, trainer.model(pixels).logits)
    model.save_pretrained(tmp_path / "copy")
    save_file({**tensors, "head": tensors["head"][:5].contiguous()}, tmp_path / "copy" / "method.safetensors")
    vouch(tmp_path / "copy")
    with pytest.raises(ConfigError, match="head rows of 5 classes, not of 6"):
        ContinualModel.from_pretrained(tmp_path / "copy", backbone=backbone)


def test_features_of_the_universal_expert_are_not_remembered(trainer):
    # Each test image is read once with each of 3 experts, and by the universal one in 3, 2 and 1 evaluations.
    assert trainer.report.test_forwards_per_image == 3 + (3 + 2 + 1) / 3
    evaluator = ContinualTrainer(trainer.model, make_trainer(tuna(), "again").args).evaluator
    for position, task in sorted(trainer._tests.items()):
        evaluator.add(task.name, trainer._images(task.test))
        found = evaluator.evaluate(task.name, task.classes, position)
        assert found.accuracy == trainer.report.accuracy_matrix[-1][position]


def test_a_model_that_goes_on_learning_is_pushed_and_saved_with_its_new_universal_expert(hub, stream):
    trainer = make_trainer(tuna(), learning_rate=1e-2)
    for task in stream[:2]:
        trainer.learn(task)
        trainer.model.push_to_hub("alice/tuna", token="hf_alice")
    expected = trainer.model.bank[0].tensors
    for folder, options in (("out", {}), ("alice/tuna", {"token": "hf_alice"})):
        found = ContinualModel.from_pretrained(folder, **options).bank[0].tensors
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_a_task_that_fails_at_its_end_leaves_the_universal_expert_as_it_was(model, stream):
    class Fails(TrainerCallback):
        def on_evaluate(self, model):
            raise ZeroDivisionError

    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = under(model, pixels, 0)
    more = TaskStream.class_incremental(pattern_dataset(8), num_tasks=4)[3]
    args = make_trainer(tuna(), "more").args
    with pytest.raises(ZeroDivisionError):
        ContinualTrainer(model, args, callbacks=[Fails()]).learn(more)
    assert model.bank.names[-1] == "task-002" and torch.equal(under(model, pixels, 0), before)
    ContinualTrainer(model, args).learn(more)
    assert model.bank.names[-1] == "task-003" and not torch.equal(under(model, pixels, 0), before)


def test_experts_are_trained_side_by_side_only_where_none_depends_on_another(stream, tmp_path):
    with pytest.raises(ConfigError, match="task_parallel needs experts that are trained apart; those of tuna"):
        make_trainer(tuna(), "out", task_parallel=True).learn_stream(stream)
    for folder, parallel in (("one", False), ("all", True)):
        make_trainer(tuna(orthogonality=0), tmp_path / folder, task_parallel=parallel).learn_stream(stream)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "all")


def test_experts_of_an_s_lora_model_are_taken(stream, tmp_path):
    giver = make_trainer(s_lora(k=1), tmp_path / "s_lora", learning_rate=1e-2)
    giver.learn_stream(stream)
    taken = make_trainer(tuna(), tmp_path / "tuna", experts_from=str(tmp_path / "s_lora"))
    assert taken.learn_stream(stream).summary()["average_accuracy"] > 0.5
    for position in range(3):
        expert, given = taken.model.bank[position + 1], giver.model.bank[position]
        assert all(torch.equal(tensor, given.tensors[key]) for key, tensor in expert.tensors.items())
    with pytest.raises(ConfigError, match="was made with peft="):
        make_trainer(tuna(r=2), "other", experts_from=str(tmp_path / "s_lora"))


def test_domains_share_the_rows_of_their_classes():
    patterns = pattern_dataset(3, domains=["plain", "negative"])
    stream = TaskStream.domain_incremental(patterns, domains=["plain", "negative"])
    trainer = make_trainer(tuna(), learning_rate=1e-2)
    assert trainer.learn_stream(stream).summary()["average_accuracy"] > 0.8
    assert trainer.model.method.head.shape == (3, 128) and len(trainer.model.method.gaussians) == 6


def test_tasks_of_one_class_are_told_apart():
    stream = TaskStream.class_incremental(pattern_dataset(3), num_tasks=3)
    assert make_trainer(tuna()).learn_stream(stream).summary()["average_accuracy"] > 0.9


@pytest.mark.usefixtures("deep")
def test_it_remembers_digits():
    stream = load_benchmark("digits", max_train_samples_per_task=48, max_test_samples_per_task=24)
    trainer = make_trainer(tuna(), num_train_epochs=3, learning_rate=1e-2, train_batch_size=16)
    assert trainer.learn_stream(stream).summary()["average_accuracy"] > 0.7  # sequential_lora: 0.2


def test_what_cannot_be_is_refused():
    model = ContinualModel.from_backbone(BACKBONE, tuna())
    with pytest.raises(ConfigError, match="'universal' is the merged expert; give the task another name"):
        model.start_task("Universal", ["a", "b"])
    model.start_task("pets", ["cat", "dog"])
    with pytest.raises(ConfigError, match="Every class of a task needs a training image"):
        model.finish_task(lambda features: (features(torch.zeros(2, 3, 32, 32)), torch.zeros(2).long()), 2)
    with pytest.raises(ConfigError, match="plain, of one rank, and has no use_dora"):
        tuna(lora={"use_dora": True})
    for weight in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="orthogonality="):
            tuna(orthogonality=weight)
