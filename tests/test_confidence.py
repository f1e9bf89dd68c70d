"""Confidence: measured on every training image as if it were not learnt, calibrated, and exact where it must be."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_trainer, pattern_dataset, vouch
from safetensors.torch import load_file, save_file

from hf_clpeft import ConfigError, ContinualModel, TaskStream, combine, slda, slda_pp
from hf_clpeft.methods.confidence import Confidence
from hf_clpeft.metrics import calibration_error
from hf_clpeft.reports.card import make_card_of
from hf_clpeft.reports.report import StreamReport, margin_bins
from hf_clpeft.routing import ROUTERS, GaussianRouter
from hf_clpeft.routing.confidence import SHARES, TEMPERATURES, best_on_grid, calibrate, losses_on_grid
from hf_clpeft.routing.covariance import leave_one_out
from hf_clpeft.streams import load_benchmark
from hf_clpeft.training.evaluation import reliability_of


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("seen", [1, 2])
def test_an_image_that_is_left_out_is_in_neither_mean_nor_covariance(views, seen):
    width, share = 5, 0.03
    features, entries = drawn(20, views, width), torch.arange(20) % 3
    others, base = drawn(2, width, seed=1), torch.eye(width).double()

    def fit(rows):
        means = torch.stack([features[rows & (entries == entry)].mean(dim=(0, 1)) for entry in range(3)])
        apart = (features - means[entries][:, None])[rows]
        return means, base + share * torch.einsum("nvi,nvj->ij", apart, apart) / views

    means, covariance = fit(torch.ones(20, dtype=torch.bool))
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    residuals = (features - means[entries][:, None]) @ inverse
    centres = torch.cat([others, means]) @ inverse
    found = leave_one_out(residuals, centres, 2 + entries, share, seen)
    for image in range(20):
        means, covariance = fit(torch.arange(20) != image)
        apart = features[image, :seen, None] - torch.cat([others, means])
        own, count = int(entries[image]), int((entries == entries[image]).sum())
        mean = features[entries == own].mean(dim=(0, 1))
        further = ((count + 1) / (count - 1)) ** 0.5 - 1
        apart[:, 2 + own] = features[image, :seen] - mean + further * (features[image].mean(dim=0) - mean)
        wanted = -torch.einsum("vei,ij,vej->ve", apart, covariance.inverse(), apart).mean(dim=0) / 2
        torch.testing.assert_close(found[image], wanted)


@pytest.mark.parametrize("count", [2, 5])
def test_an_image_that_is_left_out_is_as_far_from_its_class_as_a_new_one_is(count):
    classes, width = 400, 64
    entries = torch.arange(classes).repeat_interleave(count)
    images = drawn(classes * count, 2, width) + 3 * drawn(classes * count, 1, width, seed=1)  # of two views each
    means = images.unflatten(0, (classes, count)).mean(dim=(1, 2))
    found = leave_one_out(images - means[entries][:, None], means, entries, 1e-12)
    new = drawn(classes, 2, width, seed=2) + 3 * drawn(classes, 1, width, seed=3)
    wanted = (new - means[:, None]).square().sum(dim=2).mean() / 2
    own = -found.gather(1, entries[:, None]).mean()
    assert float(own) == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.parametrize("name", ["gaussian", "klda"])
def test_scores_of_a_router_without_an_image_are_those_of_one_that_never_saw_it(name):
    router = ROUTERS[name](query_size=6)
    if name == "klda":
        router.kernel_features = 20
    router.learn(drawn(60, 2, 6, seed=1).float(), torch.arange(60) % 3)
    before = deepcopy(router.state_dict())
    images, classes = drawn(61, 2, 6, seed=2).float(), torch.cat([2 + torch.arange(60) % 3, torch.tensor([6])])
    scores, kept = router.leave_one_out(images, classes)
    assert len(scores) == 60 and (kept == classes[:60]).all()  # the last image is alone in its class
    assert scores.shape[1] == 7 and (scores[:, 5] == -torch.inf).all()
    after = router.state_dict()
    assert name == "klda" or all(torch.equal(before[key], after[key]) for key in before)
    for image in range(0, 60, 12):
        learner = deepcopy(router)
        rest = torch.arange(61) != image
        learner.learn(images[rest], classes[rest])
        wanted = learner.class_scores(learner.scores(images[image, :1]))[0].double()
        known = scores[image].isfinite()
        apart = (scores[image] - wanted)[known]
        assert (apart - apart.mean()).abs().max() < 0.1 * wanted[known].std()  # but for the weight of shrinkage


def test_a_router_with_scores_of_its_own_has_no_formula():
    class Own(GaussianRouter):
        def scores(self, query):
            return 2 * super().scores(query)

    images, classes = drawn(12, 4).float(), torch.arange(12) % 2
    assert Own(query_size=4).leave_one_out(images, classes) is None
    assert GaussianRouter(query_size=4).leave_one_out(images, classes * 0) is None  # one class


@pytest.mark.parametrize("name", ["gaussian", "klda"])
def test_the_first_task_is_measured_too(name):
    router = ROUTERS[name](query_size=4)
    router.kernel_features = 10
    scores, kept = router.leave_one_out(drawn(12, 4).float(), torch.arange(12) % 2)
    assert scores.shape == (12, 2) and scores.isfinite().all() and len(kept) == 12


@pytest.mark.parametrize("temperature, share", [(3.0, 0.0), (40.0, 0.2), (0.1, 0.1)])
def test_what_scores_were_scaled_by_is_found(temperature, share):
    logs = torch.log_softmax(4 * drawn(20_000, 8), dim=1)
    probabilities = (1 - share) * logs.exp() + share / 8
    targets = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    losses = losses_on_grid(temperature * logs, targets)
    assert losses.shape == (len(TEMPERATURES) * len(SHARES),)
    found = best_on_grid(losses)
    assert found[0] == pytest.approx(temperature, rel=0.2) and abs(found[1] - share) <= 0.11
    calibrated = calibrate(temperature * logs, *found)
    assert calibration_error(reliability_of(calibrated, targets)) < 0.02
    assert (calibrated.argmax(dim=1) == logs.argmax(dim=1)).all()
    torch.testing.assert_close(calibrated.exp().sum(dim=1), torch.ones(20_000).double())


def test_losses_of_tasks_add_up_and_leave_with_what_they_were_beside():
    one, other = Confidence(), Confidence()
    for task in range(3):
        one.add(torch.full((222,), task + 1.0))
    other.add(torch.full((222,), 8.0))
    other.add(torch.full((222,), 9.0))
    one.merge(other)
    assert one.losses[:, 0].tolist() == [1, 2, 3, 8, 9] and one.origins.tolist() == [0, 0, 0, 3, 3]
    one.check(5)
    one.remove(1)  # the third task was measured beside it; the fourth, of another model, was not
    assert one.losses[:, 0].tolist() == [1, 0, 8, 9] and one.origins.tolist() == [0, 0, 2, 2]
    one.remove(3)
    assert one.losses[:, 0].tolist() == [1, 0, 8]
    one.remove(0)
    assert one.losses[:, 0].tolist() == [0, 8] and one.origins.tolist() == [0, 1]
    one.check(2)
    with pytest.raises(ConfigError, match="the confidence of 2 tasks, not 3"):
        one.check(3)


@pytest.mark.parametrize("right", [4, 12, 200])
def test_a_few_images_that_are_all_right_do_not_make_it_sure_beyond_measure(right):
    targets = torch.arange(right) % 4
    scores = torch.nn.functional.one_hot(targets, 4).double() * 30
    losses = losses_on_grid(scores, targets)
    temperature, share = best_on_grid(losses)
    assert temperature > 2 and share == 0
    said = calibrate(scores, temperature, share).exp().amax(dim=1)
    assert 1 - 1 / right < said.mean() < 1 - 0.01 / right


def test_a_clear_minimum_is_taken_as_it_is():
    table = losses_on_grid(torch.zeros(1, 2).double(), torch.zeros(1).long()).reshape(len(TEMPERATURES), len(SHARES))
    steps = torch.arange(len(TEMPERATURES)).double() - 20
    for depth in (1, 100):
        found = best_on_grid(
            (table + depth * steps[:, None].square().clamp(max=9) + torch.arange(len(SHARES))).flatten()
        )
        assert found == (float(TEMPERATURES[20]), 0.0)


def test_what_was_measured_among_few_of_the_classes_calibrates_nothing():
    now, targets = 10, torch.arange(40) % 4
    losses = losses_on_grid(torch.nn.functional.one_hot(targets, 4) + drawn(40, 4), targets)
    confidence = Confidence(width=64, classes=lambda: now)
    for known in (2, 4, 10):
        confidence.add(losses, known=known)
    fitted = confidence.fitted()
    assert fitted is not None and confidence.temperature() == fitted[0]
    confidence.remove(1)  # and with it what the third said, which was measured beside it
    now = 8
    assert confidence.fitted() is None is confidence.temperature()
    scores = torch.tensor([[-3.0, -4.0]])
    tails = -32 * torch.log1p(-scores / 32)
    torch.testing.assert_close(confidence(scores), tails.log_softmax(dim=1))  # as √64 / 8 = 1
    confidence.add(losses, known=8)
    assert confidence.fitted() is not None
    parts, now = [Confidence(classes=lambda: now) for _ in range(3)], 12
    for part in parts:
        part.add(losses, known=4)
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].fitted() is not None  # each part was measured, so that all classes were
    now = 25
    parts[0].remove(2)
    assert parts[0].fitted() is None
    old = Confidence(classes=lambda: now)
    old.add(losses)  # of before numbers of classes were noted
    assert old.fitted() is not None


def test_images_that_have_trained_the_features_count_as_long_as_there_are_no_others():
    logs = torch.log_softmax(4 * drawn(4_000, 4), dim=1)
    targets = torch.multinomial(logs.exp(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    confidence = Confidence(adapted=lambda: True)
    confidence.add(losses_on_grid(3 * logs, targets))
    assert confidence.fitted()[0] == pytest.approx(3, rel=0.1)
    confidence.add(torch.zeros(222))  # nothing was measured
    assert confidence.fitted()[0] == pytest.approx(3, rel=0.1)
    confidence.add(losses_on_grid(12 * logs, targets))
    assert confidence.fitted()[0] == pytest.approx(12, rel=0.1)


def test_one_temperature_suits_images_of_much_noise_and_of_little():
    width, means = 60, 4 * drawn(10, 60) / 60**0.5
    noisy, targets = torch.arange(8_000) % 2 == 1, torch.arange(8_000) // 2 % 10
    images = means[targets] + torch.where(noisy, 2.0, 0.7)[:, None] * drawn(8_000, width, seed=1)
    scores, known = -torch.cdist(images, means).square() / 2, torch.arange(8_000) < 4_000

    def errors(confidence):
        confidence.add(confidence.measure(scores[known], targets[known]))
        said = confidence(scores)
        assert (said.argmax(dim=1) == scores.argmax(dim=1)).all()
        new = [~known & noisy, ~known & ~noisy]
        return [calibration_error(reliability_of(said[rows], targets[rows])) for rows in new]

    assert max(errors(Confidence(width=width))) < 0.04 < 0.08 < min(errors(Confidence()))


def test_models_of_before_tails_were_lengthened_stay_as_they_are():
    old, new = Confidence(width=8), Confidence(width=8)
    old.width = torch.tensor(0)
    old.add(torch.ones(222))
    new.add(torch.ones(222))
    old.merge(new)
    assert old.losses.any(dim=1).tolist() == [True, False] and old.width == 0
    none = Confidence(width=8)
    none.width = torch.tensor(0)
    none.add(torch.zeros(222))
    none.merge(new)
    assert none.losses.any(dim=1).tolist() == [False, True] and none.width == 8
    for wrong in (9, [8]):
        none.width = torch.tensor(wrong)
        with pytest.raises(ConfigError, match="confidence of .*[98].* features"):
            none.check(2)


def test_what_was_measured_early_is_brought_up_to_date():
    logs, now = torch.log_softmax(4 * drawn(4_000, 4), dim=1), torch.ones(2)
    targets = torch.multinomial(logs.exp(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    confidence = Confidence(lambda origins: now)
    confidence.add(losses_on_grid(3 * logs, targets), spread=0.5, known=4)
    confidence.add(torch.zeros(222))  # nothing was measured
    assert confidence.fitted()[0] == pytest.approx(6, rel=0.1)  # scores are twice as large by now
    plain = Confidence()
    plain.merge(confidence)
    assert plain.fitted()[0] == pytest.approx(3, rel=0.1)
    now = torch.ones(3)
    confidence.add(losses_on_grid(12 * logs, targets), spread=1.0, known=40)
    assert 10 < confidence.fitted()[0] < 12.5  # beside ten times as many classes, and ten times as important
    assert confidence.spreads.tolist() == [0.5, 0, 1] and confidence.known.tolist() == [4, 0, 40]
    confidence.remove(0)
    now = torch.ones(2)
    assert confidence.spreads.tolist() == confidence.known.tolist() == [0, 0] and confidence.temperature() is None


@pytest.mark.parametrize("origins", [None, [0, 0, 0], [0, 1, 1], [0, 1, 2]])
def test_a_router_tells_how_far_apart_classes_are_that_were_known_together(origins):
    router = GaussianRouter(query_size=4)
    for task, classes in enumerate(([0, 1, 2], [3], [4, 0])):  # one of them in another domain
        router.learn(drawn(40, 4, seed=task).float(), torch.tensor(classes * 40)[:40])
    centres, found = router._centres.double(), router.spreads(None if origins is None else torch.tensor(origins))
    for task, first in enumerate(origins or [0, 0, 0]):
        known = [place for place, owner in enumerate(router.owners.tolist()) if first <= owner <= task]
        pairs = [(i, j) for i in known for j in known if i < j and router.owners[j] == task]
        wanted = [float((centres[i] - centres[j]).square().sum()) for i, j in pairs]
        assert found[task].item() == pytest.approx(np.mean(wanted) if wanted else 0, abs=1e-5)


def test_calibration_error_counts_images_and_bins():
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.55, 0.45]]).log()
    table = reliability_of(logits, torch.tensor([0, 0, 1, 1]))
    assert table.sum(axis=0).tolist() == pytest.approx([4, 3.25, 2])
    assert calibration_error(table) == pytest.approx((3 * abs(0.9 - 2 / 3) + 0.55) / 4)
    assert calibration_error([table, table]) == pytest.approx(calibration_error(table))
    assert np.isnan(calibration_error(np.zeros((15, 3))))


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)


def test_a_model_keeps_its_confidence_and_reads_what_was_saved_without(stream, tmp_path):
    trainer = make_trainer(slda(), tmp_path / "model")
    report = trainer.learn_stream(stream)
    assert report.summary()["calibration_error"] == calibration_error(report.reliability)
    model = ContinualModel.from_pretrained(tmp_path / "model")
    image = next(iter(stream[0].test))[0]
    assert model.predict(image) == trainer.model.predict(image)
    assert model.method.confidence.fitted() == trainer.model.method.confidence.fitted() is not None
    state = load_file(tmp_path / "model" / "method.safetensors")
    wrongs = {name: -state[f"confidence.{name}"] - 1 for name in ("losses", "spreads", "known")}
    for name, wrong in (*wrongs.items(), ("origins", state["confidence.origins"] + 1)):
        save_file({**state, f"confidence.{name}": wrong}, tmp_path / "model" / "method.safetensors")
        vouch(tmp_path / "model")
        with pytest.raises(ConfigError, match="losses below 0, or of tasks beside|numbers of them, below 0"):
            ContinualModel.from_pretrained(tmp_path / "model")
    noted = ("confidence.spreads", "confidence.known", "confidence.width")
    of_before = {key: value for key, value in state.items() if key not in noted}
    for wrong, said in ((torch.tensor(1.0), "has shape"), (state["confidence.losses"][:2], "of 2 tasks, not 3")):
        save_file({**of_before, "confidence.losses": wrong}, tmp_path / "model" / "method.safetensors")
        vouch(tmp_path / "model")
        with pytest.raises(ConfigError, match=said):
            ContinualModel.from_pretrained(tmp_path / "model")
    save_file(of_before, tmp_path / "model" / "method.safetensors")
    vouch(tmp_path / "model")
    old = ContinualModel.from_pretrained(tmp_path / "model")
    assert old.method.confidence.fitted() == best_on_grid(state["confidence.losses"].double().sum(dim=0))
    (tmp_path / "model" / "method.safetensors").unlink()
    vouch(tmp_path / "model")
    old = ContinualModel.from_pretrained(tmp_path / "model")
    assert old.method.confidence.fitted() is None and len(old.method.confidence.losses) == 3
    assert [found.label for found in old.predict(image)] == [found.label for found in model.predict(image)]


def test_a_class_of_a_few_images_leaves_the_confidence_as_it_is(stream, tmp_path):
    trainer = make_trainer(slda(), tmp_path / "model")
    for task in stream[:2]:
        trainer.learn(task)
    before = trainer.model.method.confidence.fitted()
    trainer.model.router.learns_few = True
    trainer.learn(stream[2])
    assert trainer.model.method.confidence.fitted() == before is not None


def test_the_recommended_method_does_everything(stream, tmp_path):
    first, both = (TaskStream(list(stream)[:1]), TaskStream(list(stream)[1:]))
    for name, part in (("one", first), ("two", both)):
        make_trainer(slda_pp(adapt=False), tmp_path / name).learn_stream(part)
    model = combine([tmp_path / "one", tmp_path / "two"])
    assert len(model.config.classes) == 6 and not model.config.expert_names and not len(model.bank)
    assert model.method.confidence.origins.tolist() == [0, 1, 1]
    images = [image for task in stream for image, *_ in task.test]
    predictions = model.predict(images, reject_rate=0.05)
    labels = [task.classes[number] for task in stream for _, number, *_ in task.test]
    right = [found.label == label for found, label in zip(predictions, labels, strict=True)]
    assert np.mean(right) > 0.8 and {0 < found.score <= 1 for found in predictions} == {True}
    model.remove(model.config.tasks[0].name)  # the first task, too
    alone = ContinualModel.from_pretrained(tmp_path / "two")
    assert [found.classes for found in model.predict(images)] == [found.classes for found in alone.predict(images)]


def test_a_model_that_has_lost_what_calibrated_it_says_so_until_it_learns_again(tmp_path):
    stream = load_benchmark("digits", max_train_samples_per_task=24, max_test_samples_per_task=24)
    method = slda_pp(adapt=False, views=2, view_kind="crop", query_layers=[1])
    trainer = make_trainer(method, tmp_path / "model")
    trainer.learn_stream(stream)
    assert trainer.model.config.calibrated is True and trainer.report.temperature is not None
    promise, apology = "the probability that it is right, calibrated", "is no calibrated probability: too little"
    assert promise in (tmp_path / "model" / "README.md").read_text()
    model = ContinualModel.from_pretrained(tmp_path / "model")
    model.remove("task-001")
    model.save_pretrained(tmp_path / "model")
    model = ContinualModel.from_pretrained(tmp_path / "model")
    assert model.config.calibrated is False and model.method.temperature() is None is model.report.temperature
    for text in ((tmp_path / "model" / "README.md").read_text(), str(make_card_of(tmp_path / "model", "me/model"))):
        assert apology in text and promise not in text and "temperature" not in text
    images = [image for task in stream if task.name != "task-001" for image, *_ in task.test]
    assert 0.6 < np.mean([found.score for found in model.predict(images)]) < 0.99
    trainer = type(trainer)(model, trainer.args)
    trainer.learn(replace(stream[1], name="again"))
    assert model.method.temperature() == model.report.temperature is not None
    assert promise in (tmp_path / "model" / "README.md").read_text()


def test_adapted_features_belong_to_the_first_task(stream, tmp_path):
    for seed in (0, 1):
        make_trainer(slda_pp(), tmp_path / str(seed), num_train_epochs=1, seed=seed).learn_stream(stream)
    model = ContinualModel.from_pretrained(tmp_path / "0")
    assert model.method.bank.names == ["all-tasks"] and model.method.query_passes == 2
    with pytest.raises(ConfigError, match="cannot be removed exactly, as its expert takes everyone's query features"):
        model.remove(model.config.tasks[0].name)
    model.remove(model.config.tasks[-1].name)
    with pytest.raises(ConfigError, match="their first task's expert differs"):
        combine([tmp_path / "0", tmp_path / "1"])


def test_a_report_says_how_often_routes_were_right_by_how_clear_they_were(learnt):
    """The counts are those of the model's own predictions."""
    margins, counts = learnt.report.route_margins, np.zeros((3, 2), dtype=int)
    for task in learnt.stream:
        for found in learnt.model.predict([image for image, *_ in task.test], top_k=len(learnt.model.bank)):
            (place,) = margin_bins(np.array([list(found.experts.values())]))
            counts[place] += [1, found.expert == task.name]
    assert margins == counts.tolist() and sum(margins[2]) > 20
    values = learnt.report.to_dict()
    assert StreamReport.from_dict(values, learnt.model.config.tasks).route_margins == margins


WRONG_LISTS = {
    "not a list": "x",
    "a mapping": {},
    "a number": 5,
    "text": ["x", "y", "z"],
    "text in rows": [["x"] * 3] * 3,
    "one row": [[1, 2, 3, 4]],
    "one short row": [[1, 1]],
    "columns of one": [[1], [1], [1]],
    "empty rows": [[], [], []],
    "ragged": [[1, 1, 1], [1, 1], [1, 1, 1]],
    "deep": [[[1, 1, 1]] * 3] * 3,
    "negative": [[5, -1, -7]] * 3,
    "huge": [[2**62, 2**62, 2**62]] * 3,
    "huge floats": [[1e308, 1e308, 1e308]] * 15,
    "many negative": [[-1.0, -1.0, -1.0]] * 15,
    "more right than there are": [[10, 10.0, 30]] * 15,
    "nothing measured": [[None, None, None]] * 15,
    "truths": [[True, True, True]] * 3,
}
LISTS = ("accuracy_matrix", "routing_confusion", "reliability", "route_margins")


@pytest.mark.parametrize("what", WRONG_LISTS)
def test_a_report_with_a_wrong_list_is_refused_and_named(learnt, what):
    values, tasks = learnt.report.to_dict(), learnt.model.config.tasks
    assert len(tasks) == 3 and values["reliability"] and values["routing_confusion"]
    StreamReport.from_dict(values, tasks)
    for name in LISTS:
        with pytest.raises(ConfigError, match="^metrics.json cannot be used: "):
            StreamReport.from_dict({**values, name: WRONG_LISTS[what]}, tasks)


def test_a_report_of_impossible_numbers_is_refused(learnt):
    values, tasks = learnt.report.to_dict(), learnt.model.config.tasks
    for name, wrong, message in (
        ("oracle_accuracy", [0.5, 0.5], "oracle_accuracy has 2 entries for 3 tasks"),
        ("oracle_accuracy", [0.5, 0.5, 1.5], "an accuracy is 1.5"),
        ("untrained_accuracy", [-1.0, 0.5, 0.5], "an accuracy is -1.0"),
        ("untrained_accuracy", [], "untrained_accuracy has 0 entries"),
        ("titles", ["a"], "titles has 1 entries"),
        ("experts", [], "routing_confusion has a row of 3 numbers"),
        ("stored_bytes", [1e308] * 3, "a cost is 1e"),
        ("seconds", [{"train": 1e308}] * 3, "a cost is 1e"),
        ("seconds", [{}], "seconds has 1 entries"),
        ("test_forwards_per_image", -1e308, "a cost is -1e"),
        ("temperature", 0.0, "temperature is 0.0"),
        ("temperature", -2.0, "temperature is -2.0"),
        ("computed", {"f1": [0.5]}, r"computed\['f1'\] has 1 entries"),
    ):
        with pytest.raises(ConfigError, match=f"^metrics.json cannot be used: .*{message}"):
            StreamReport.from_dict({**values, name: wrong}, tasks)
