"""MOS: adapters that start from those before, and predictions that hop to the expert of the class they name."""

import pytest
import torch
from conftest import OnStep, make_trainer, outcome, pattern_dataset
from safetensors.torch import load_file

from hf_clpeft import ConfigError, ContinualModel, ContinualTrainer, TaskStream, load_benchmark, mos, s_lora


pytestmark = pytest.mark.usefixtures("shallow")
BACKBONE = "hf-clpeft/vit-tiny-glyphs"


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6, per_class=8), num_tasks=3)


@pytest.fixture(scope="module")
def folder(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mos")
    make_trainer(mos(r=2), folder, num_train_epochs=4).learn_stream(stream)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ContinualModel.from_pretrained(folder)


def images(count=12):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(method):
    return [parameter for parameter in method.bank.slot.parameters() if parameter.requires_grad]


def test_an_adapter_starts_from_the_one_before_and_is_pulled_to_the_mean_of_all_before(folder, stream):
    model = ContinualModel.from_pretrained(folder)
    method, experts = model.method, list(model.bank)
    model.start_task("task-003", ["new", "newer"])
    started = [parameter.detach().clone() for parameter in trained(method)]
    expert = method.bank.slot.peft_model.state_dict()
    found = {key.replace(".default", ""): tensor for key, tensor in expert.items() if "lora_" in key}
    assert len(found) == len(experts[-1].tensors)
    for key, tensor in experts[-1].tensors.items():
        assert torch.equal(found[key], tensor)
    keys = [key for key, _ in method.bank.slot.peft_model.named_parameters() if "lora_" in key]
    batch = type("Batch", (), {"pixels": images(), "labels": torch.tensor(method.numbers * 6)})
    method.loss(batch).mean().backward()
    for key, before, now in zip(keys, started, trained(method), strict=True):
        mean = sum(one.tensors[key.replace(".default", "")] for one in experts) / 3
        torch.testing.assert_close(now.detach(), 0.9 * before + 0.1 * mean)
    pulled = [parameter.detach().clone() for parameter in trained(method)]
    method.loss(batch)  # another part of the same batch
    assert all(torch.equal(now, one) for now, one in zip(trained(method), pulled, strict=True))
    model.method.abandon()


def test_a_first_adapter_is_not_pulled():
    model = ContinualModel.from_backbone(BACKBONE, mos())
    model.start_task("task-000", ["a", "b"])
    before = [parameter.detach().clone() for parameter in trained(model.method)]
    model.method.loss(type("Batch", (), {"pixels": images(2), "labels": torch.tensor([0, 1])}))
    assert all(torch.equal(now, one) for now, one in zip(trained(model.method), before, strict=True))


def naive(model, pixels, hops):
    """The prediction of one image, in plain words."""
    method = model.method
    means = torch.nn.functional.normalize(method.router.prototypes, dim=1)
    cosines = torch.nn.functional.normalize(method.query(pixels[None]), dim=1)[0] @ means.T
    owner = dict(zip(method.router.classes.tolist(), method.router.owners.tolist(), strict=True))
    by_class = cosines[method.router.classes.argsort()]
    expert = owner[int(by_class.argmax())]
    for hop in range(hops):
        logits = method.heads(model.bank(pixels[None], torch.tensor([expert])), torch.tensor([expert]))[0]
        wanted = owner[int(logits.argmax())]
        if wanted == expert or hop == hops - 1:
            break
        expert = wanted
    return (logits.softmax(dim=0) + (3 * by_class).softmax(dim=0)) / 2, expert


@pytest.mark.parametrize("hops", [1, 2, 4])
@torch.no_grad()
def test_an_image_hops_to_the_expert_of_its_predicted_class(folder, hops):
    model = ContinualModel.from_pretrained(folder)
    model.method.options.hops = hops
    # Rows at odds with the class means, so that images do hop.
    rows = torch.randn(model.heads.weights[-1].shape, generator=torch.Generator().manual_seed(1))
    model.heads.weights[-1].copy_(rows - rows.mean(dim=0))
    output = model(images())
    expected = [naive(model, one, hops) for one in images()]
    torch.testing.assert_close(output.logits.exp(), torch.stack([found for found, _ in expected]))
    assert output.selection.tolist() == [expert for _, expert in expected]
    start = model.method.route(model.method.query(images())).selection
    assert torch.equal(start, output.selection) == (hops == 1)
    backwards = model(images().flip(0))
    torch.testing.assert_close(backwards.logits.flip(0), output.logits, atol=1e-4, rtol=1e-4)
    forced = model(images(), expert=2)
    assert (forced.selection == 2).all()


@torch.no_grad()
def test_only_images_that_hop_are_read_again(model):
    passes = []
    hook = model.backbone.model.layers[0].register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    model(images())
    hook.remove()
    assert passes[:2] == [12, 12] and len(passes) <= 5 and passes[2:] == sorted(passes[2:], reverse=True)


def test_a_class_of_several_tasks_is_known_to_the_expert_that_was_asked(tmp_path):
    data = pattern_dataset(3, per_class=8, domains=["plain", "negative"])
    stream = TaskStream.domain_incremental(data, domain_column="domain")
    trainer = make_trainer(mos(r=2), tmp_path, num_train_epochs=4)
    report = trainer.learn_stream(stream)
    assert min(report.accuracy_matrix[-1]) > 0.6
    method = trainer.model.method
    assert method.router.classes.tolist() == [0, 1, 2] * 2
    scores = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]]).repeat(2, 1)
    assert method.next_expert(torch.tensor([1, 2]), torch.tensor([0, 1]), scores).tolist() == [0, 1]
    method.router.classes = torch.tensor([0, 1, 2, 3, 1, 2])  # as if class 0 were not in the second task
    assert method.next_expert(torch.tensor([0, 1, 3]), torch.tensor([1, 1, 0]), scores[:1]).tolist() == [0, 1, 1]


def test_it_is_saved_and_refuses_what_it_cannot(model, folder):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "method.safetensors").items()}
    assert shapes["gaussians.means"] == (6, 128) and len(shapes) == 5
    assert model.bank.names == ["task-000", "task-001", "task-002"]
    with pytest.raises(ConfigError, match="none can be removed exactly"):
        model.remove("task-000")
    with pytest.raises(ConfigError, match="trained for all tasks together"):
        model.method.alike()
    for options, message in (({"hops": 0}, "hops=0 must be between"), ({"momentum": 2.0}, "momentum=2.0 must be")):
        with pytest.raises(ConfigError, match=message):
            mos(**options)


def test_experts_of_other_methods_are_read_by_it(stream, folder, tmp_path):
    make_trainer(s_lora(r=2, k=2), tmp_path / "giver", num_train_epochs=4).learn_stream(stream)
    for giver in (tmp_path / "giver", folder):
        taker = make_trainer(mos(r=2), "taken", experts_from=str(giver), overwrite_output_dir=True)
        report = taker.learn_stream(stream)
        assert min(report.accuracy_matrix[-1]) > 0.6
        given = ContinualModel.from_pretrained(giver).bank
        for one, other in zip(taker.model.bank, given, strict=True):
            assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


def test_a_resumed_run_ends_with_the_same_bits_and_counts(stream, folder):
    def kill(step, steps):
        if step == 5:
            raise RuntimeError("killed")

    options = {"save_steps": 2, "num_train_epochs": 4}
    make_trainer(mos(r=2), "run", **options).learn(stream[0])
    args = make_trainer(mos(r=2), "run", **options, resume_from_checkpoint="auto").args
    with pytest.raises(RuntimeError, match="killed"):
        ContinualTrainer(ContinualModel.from_pretrained("run"), args, [OnStep(kill)]).learn_stream(stream)
    ContinualTrainer(ContinualModel.from_pretrained("run"), args).learn_stream(stream)
    assert outcome("run") == outcome(folder)


def test_experts_that_start_from_others_are_not_trained_in_parallel(stream, tmp_path):
    trainer = make_trainer(mos(), tmp_path, task_parallel=True)
    with pytest.raises(ConfigError, match="those of mos are not"):
        trainer.learn_stream(stream)


def test_digits_are_remembered(tmp_path):
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=24)
    trainer = make_trainer(mos(), tmp_path, num_train_epochs=3, learning_rate=1e-2)
    assert trainer.learn_stream(stream).summary()["average_accuracy"] > 0.6  # sequential_lora: 0.2
