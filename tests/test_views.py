"""Views of images: drawn, summed over by routers that know classes, and averaged over at test time."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from hf_clpeft import METHODS, ConfigError, ContinualModel, ContinualTrainer, ContinualTrainingArguments, s_lora
from hf_clpeft.backbones.views import AUGMENTATIONS, augment, draw_views, fixed_views, views_for_sums
from hf_clpeft.routing import ROUTERS, ClassRouter
from hf_clpeft.routing.held_out import held_out_loss
from hf_clpeft.streams import load_benchmark


closed_form = METHODS["closed_form"].Config
KNOWING = [name for name, router in ROUTERS.items() if issubclass(router, ClassRouter)]
SMALL = {"ridge": {"projection_size": 40}, "low_rank_ridge": {"projection_size": 40}, "klda": {"kernel_features": 40}}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_views_keep_shape_and_range(augmentation):
    torch.manual_seed(0)
    pixels = torch.rand(64, 3, 16, 16)
    seen = augment(pixels, draw_views(64, augmentation, pixels.device))
    assert seen.shape == pixels.shape and seen.min() >= 0 and seen.max() <= 1
    if augmentation == "flip":
        mirrored = (seen - pixels.flip(-1)).abs().amax(dim=(1, 2, 3)) < 1e-5
        kept = (seen - pixels).abs().amax(dim=(1, 2, 3)) < 1e-5
        assert (mirrored ^ kept).all() and 16 < mirrored.sum() < 48


def test_crops_without_mirrors_are_never_mirrored_and_stay_within_the_image():
    views = draw_views(500, "crop", torch.device("cpu"))
    sides = views[:, 0, 0]
    assert (sides == views[:, 1, 1]).all() and (sides**2).min() >= 0.5 and (sides**2).max() <= 1
    assert (views[:, :, 2].abs() <= 1 - sides[:, None] + 1e-6).all()
    assert (draw_views(500, "crop_flip", torch.device("cpu"))[:, 0, 0] < 0).float().mean().sub(0.5).abs() < 0.1


def test_the_first_views_are_the_image_and_its_mirror_image():
    pixels = torch.rand(3, 3, 8, 8)
    for kind in ("crop_flip", "flip"):
        for views in (views_for_sums(3, 2, kind, seed=0), fixed_views(2, kind)):
            first, second = (augment(pixels, view) for view in views)
            assert torch.equal(first, pixels)
            torch.testing.assert_close(second, pixels.flip(-1))
    assert [view is None for view in fixed_views(5, "crop")] == [True] + 4 * [False]
    assert all((view[0, 0] > 0).all() for view in fixed_views(6, "crop")[1:])


def test_random_views_follow_the_seed_alone():
    one, same, other = (torch.stack(views_for_sums(5, 4, "crop", seed)[1:]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "options", [{"views": 0}, {"views": 100}, {"views": 3, "view_kind": "flip"}, {"test_views": 13}]
)
def test_views_that_there_are_not(options):
    with pytest.raises(ConfigError, match="must be from 1 to"):
        closed_form(**options)


def test_prototypes_have_no_views():
    with pytest.raises(ConfigError, match="views"):
        s_lora(views=8)


def some(count, classes, views, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 10, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % classes
    images = centres[labels] + 0.5 * torch.randn(count, 10, generator=generator)
    return images[:, None] + 0.2 * torch.randn(count, views, 10, generator=generator), labels


def make(name):
    router = ROUTERS[name](query_size=10)
    for option, value in SMALL.get(name, {}).items():
        setattr(router, option, value)
    return router


@pytest.mark.parametrize("name", KNOWING)
def test_repeating_a_view_changes_nothing(name):
    features, labels = some(40, 4, views=1)
    once, thrice = make(name), make(name)
    once.learn(features[:, 0], labels)
    thrice.learn(features.expand(-1, 3, -1), labels)
    query = some(20, 4, views=1, seed=1)[0][:, 0]
    assert torch.equal(once.counts, thrice.counts)
    torch.testing.assert_close(thrice(query).scores, once(query).scores, rtol=2e-2, atol=2e-3)


def test_a_gaussian_router_on_views_is_lda_on_all_of_them_but_for_shrinkage():
    features, labels = some(200, 4, views=6)
    router = make("gaussian")
    router.learn(features, labels)
    flat = torch.nn.functional.normalize(features, dim=-1).flatten(0, 1).double()
    repeated = labels.repeat_interleave(6)
    np.testing.assert_allclose(router.prototypes, np.stack([flat[repeated == c].mean(0) for c in range(4)]), atol=1e-6)
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(flat, repeated)
    query = torch.nn.functional.normalize(some(100, 4, views=1, seed=3)[0][:, 0], dim=-1)
    named = router.class_scores(router(query).scores).argmax(dim=1).numpy()
    assert (named == lda.predict(query.double())).mean() > 0.98


@pytest.mark.parametrize("name", KNOWING)
def test_scores_of_test_views_are_averaged(name):
    router = make(name)
    router.learn(*some(40, 4, views=2))
    query = some(7, 4, views=3, seed=1)[0]
    apart = torch.stack([router(query[:, view]).scores for view in range(3)])
    torch.testing.assert_close(router(query).scores, apart.mean(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(router(query[:1]).scores, router(query).scores[:1], rtol=1e-4, atol=1e-4)


def test_held_out_loss_prefers_features_that_tell_classes_apart():
    features, labels = some(100, 4, views=2)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    for name in KNOWING:
        assert held_out_loss(make(name), features, labels) < held_out_loss(make(name), noise, labels)
    assert held_out_loss(make("gaussian"), features[:1], labels[:1]) == 0


def learn(options, folder, stream, **args):
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", options)
    trainer = ContinualTrainer(
        model, ContinualTrainingArguments(output_dir=folder, disable_tqdm=True, num_train_epochs=1, **args)
    )
    trainer.learn_stream(stream)
    return model


@pytest.fixture(scope="module")
def digits():
    return load_benchmark("digits", max_train_samples_per_task=60, max_test_samples_per_task=20)[:2]


def test_a_model_on_views_chooses_their_kind_resumes_and_loads(digits, tmp_path):
    options = closed_form(router="gaussian", query_layers=[-2, -1], views=4, test_views=2)
    whole = learn(options, tmp_path / "whole", digits)
    assert whole.method.options.view_kind in ("crop", "crop_flip", "flip")
    assert whole.method.query_passes == 2

    learn(closed_form(**vars(options) | {"view_kind": "auto"}), tmp_path / "half", digits[:1])
    half = ContinualModel.from_pretrained(tmp_path / "half")
    trainer = ContinualTrainer(half, ContinualTrainingArguments(output_dir=tmp_path / "half", disable_tqdm=True))
    trainer.learn_stream(digits)
    for key, tensor in whole.method.router.state_dict().items():
        assert torch.equal(tensor, half.method.router.state_dict()[key]), key

    images = [image for image, _, _ in digits[1].test][:6]
    loaded = ContinualModel.from_pretrained(tmp_path / "whole")
    together = loaded.predict(images)
    assert together == whole.predict(images)
    assert [one.label for one in together] == [loaded.predict(image)[0].label for image in images]


def test_views_do_not_depend_on_the_batch_size(digits, tmp_path):
    options = {"router": "gaussian", "views": 3, "view_kind": "crop"}
    one, other = (
        learn(closed_form(**options), tmp_path / str(size), digits[:1], eval_batch_size=size) for size in (7, 60)
    )
    torch.testing.assert_close(one.method.router.sum_up(), other.method.router.sum_up(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("views, kinds", [(8, ["crop", "crop_flip"]), (2, ["crop", "crop_flip", "flip"])])
def test_a_kind_that_has_too_few_views_is_not_tried(views, kinds):
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", METHODS["slda"].Config(views=views))
    tried = []

    def features_of(look, count=1, kind="none", /):
        tried.append(kind)
        generator = torch.Generator().manual_seed(len(tried))
        return torch.randn(20, count, model.method.query_size, generator=generator), torch.arange(20) % 2

    model.start_task("pets", ["cat", "dog"])
    model.finish_task(features_of, num_train_images=20)
    assert tried == kinds and model.config.method.view_kind in kinds


@pytest.mark.parametrize(
    "features_of",
    [
        lambda look: (look(torch.zeros(4, 3, 32, 32)), torch.arange(4) % 2),
        lambda look, views=1, kind="none": (look(torch.zeros(4, 3, 32, 32)), torch.arange(4) % 2),
    ],
    ids=["no views", "ignored views"],
)
def test_a_loop_of_ones_own_without_views_is_told_what_to_write(features_of):
    model = ContinualModel.from_backbone(
        "hf-clpeft/vit-tiny-glyphs", METHODS["slda"].Config(views=2, view_kind="flip")
    )
    model.start_task("pets", ["cat", "dog"])
    with pytest.raises(
        ConfigError, match=r"slda looks at 2 views .* finish_task a function of \(features, views, aug"
    ):
        model.finish_task(features_of, num_train_images=4)
    plain = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", METHODS["slda"].Config())
    plain.start_task("pets", ["cat", "dog"])
    plain.finish_task(features_of, num_train_images=4)
