"""LayUP: ridge regression on several layers, and the router below it, which has no random features."""

import numpy as np
import pytest
import torch
from conftest import make_trainer, pattern_dataset
from safetensors.torch import load_file
from test_class_routers import WIDTH, images, learn, of_classes

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    LinearRidgeRouter,
    TaskStream,
    combine,
    layup,
    layup_first,
    load_benchmark,
)
from hf_clpeft.routing.ridge import RIDGES, choose_penalty


def make():
    return LinearRidgeRouter(WIDTH)


def test_it_is_the_ridge_of_scikit_learn():
    from sklearn.linear_model import Ridge

    router = learn(make(), [0, 1], [2])
    assert router.penalty.item() in np.float32(RIDGES)
    features = torch.cat([images([0, 1], seed=1)[0], images([2], seed=3)[0]])
    ridge = Ridge(alpha=router.penalty.item(), fit_intercept=False)
    ridge.fit(features.double(), torch.eye(3)[torch.arange(3).repeat_interleave(30)])
    query = images([0, 1, 2], seed=9)[0]
    np.testing.assert_allclose(router(query).scores, ridge.predict(query.double()), atol=1e-3)


def test_penalty_is_the_best_on_a_held_out_fifth():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 30, generator=generator, dtype=torch.float64)
    targets = features[:, :2] + torch.randn(50, 2, generator=generator, dtype=torch.float64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    held_out, fitted = order[:10], order[10:][:30]
    errors = []
    for penalty in RIDGES:
        own = features[fitted]
        weights = torch.linalg.solve(own.T @ own + penalty * torch.eye(30), own.T @ targets[fitted])
        errors.append((features[held_out] @ weights - targets[held_out]).square().mean().item())
    assert choose_penalty(features[:, None], targets) == RIDGES[int(np.argmin(errors))]
    assert choose_penalty(features[:4, None], targets[:4]) == 1


def test_order_merging_and_saving_as_of_the_other_routers():
    query, _ = images([0, 1, 2, 3], seed=5)
    whole, half, other, loaded = learn(make(), [0, 1], [2, 3]), learn(make(), [0, 1]), make(), make()
    features, labels = images([2, 3], seed=1 + 5)
    other.learn(features, labels - 2)
    half.merge(other, [2, 3])
    torch.testing.assert_close(of_classes(half, query), of_classes(whole, query), atol=1e-4, rtol=1e-4)
    other.merge(learn(make(), [0, 1]), [2, 3])
    torch.testing.assert_close(other.gram, whole.gram, rtol=1e-4, atol=1e-2)
    assert {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()} == {
        "prototypes": (4, WIDTH),
        "counts": (4,),
        "owners": (4,),
        "classes": (4,),
        "gram": (WIDTH, WIDTH),
        "moments": (4, WIDTH),
        "penalty": (),
    }
    loaded.load(whole.state_dict(), num_tasks=2, num_classes=4)
    assert torch.equal(loaded(query).scores, whole(query).scores)


@pytest.mark.parametrize(
    "name, change",
    [
        ("gram", lambda t: t[:-1]),
        ("gram", lambda t: t * torch.nan),
        ("moments", lambda t: t[:, :-1]),
        ("moments", lambda t: t * torch.inf),
        ("penalty", lambda t: t[None]),
        ("classes", lambda t: t * 0),
    ],
)
def test_what_does_not_fit_is_not_loaded(name, change):
    tensors = learn(make(), [0, 1], [2, 3]).state_dict()
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError):
        make().load(tensors, num_tasks=2, num_classes=4)


# The methods


@pytest.fixture(scope="module")
def digits():
    return load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=24)


def naive_features(model, pixels):
    """[CLS] after each of the last six layers, centred and normalised; the last after the final layer norm."""
    found = model.backbone.model(pixel_values=pixels, output_hidden_states=True)
    layers = [layer[:, 0] for layer in found.hidden_states[-6:-1]]
    layers = [layer - layer.mean(dim=-1, keepdim=True) for layer in layers] + [found.last_hidden_state[:, 0]]
    return torch.cat([torch.nn.functional.normalize(layer, dim=-1) for layer in layers], dim=-1)


def test_it_is_a_ridge_on_the_layers_side_by_side(backbone):
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", layup())
    assert model.config.method.query_layers == [-6, -5, -4, -3, -2, -1] and model.method.query_size == 6 * 128
    pixels = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    with torch.no_grad():
        for number in range(2):
            own = labels // 2 == number
            model.start_task(f"task-{number}", [f"class {2 * number}", f"class {2 * number + 1}"])
            model.finish_task(lambda features, own=own: (features(pixels[own]), labels[own]), num_train_images=20)
        wanted = naive_features(model, pixels)
        torch.testing.assert_close(model.method.query(pixels), wanted, atol=1e-4, rtol=1e-4)
        gram, targets = wanted.T @ wanted, torch.nn.functional.one_hot(labels).float()
        ridge = max(float(model.router.penalty), torch.finfo(torch.float32).eps * float(gram.trace()))
        weights = torch.linalg.solve((gram + ridge * torch.eye(len(gram))).double(), (wanted.T @ targets).double())
        torch.testing.assert_close(model(pixels).logits.double(), wanted.double() @ weights, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("method", [layup, layup_first], ids=lambda method: method.name)
def test_digits_are_learnt_without_forgetting(method, digits, tmp_path):
    trainer = make_trainer(method(), tmp_path, num_train_epochs=1, train_batch_size=16)
    summary = trainer.learn_stream(digits).summary()
    assert summary["average_accuracy"] > 0.5
    model = trainer.model
    assert load_file(tmp_path / "router.safetensors")["gram"].shape == (768, 768)
    with pytest.raises(
        ConfigError, match="cannot be removed exactly, as the sums of its router hold the images of all"
    ):
        model.remove("task-001")
    assert combine([model, model]).router.num_owners == 2 * len(digits)  # what cannot be removed counts twice


def test_more_layers_than_the_backbone_has_are_refused():
    with pytest.raises(ConfigError, match="but the backbone has 6 layers"):
        ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", layup(query_layers=[-7, -1]))


def test_its_router_serves_other_methods_too(tmp_path):
    domains = ["plain", "negative"]
    stream = TaskStream.domain_incremental(pattern_dataset(domains=domains), domains=domains)
    method = METHODS["closed_form"].Config(router="linear_ridge", query_layers=[-2, -1])
    report = make_trainer(method, tmp_path).learn_stream(stream)
    assert report.summary()["average_accuracy"] > 0.5
