"""The demo of every kind of method: what is not there is not shown."""

from pathlib import Path

import pytest
import torch
from conftest import SEVEN, make_trainer, pattern_dataset
from PIL import Image

from hf_clpeft import METHODS, Method, TaskStream, ncm, s_lora, s_lora_mix, sequential_lora
from hf_clpeft.config.method import OPTIONS
from hf_clpeft.demo import views
from hf_clpeft.demo.app import build_demo
from hf_clpeft.demo.handlers import Handlers
from hf_clpeft.demo.models import Models
from hf_clpeft.demo.teaching import refusal, teach


@pytest.mark.parametrize("learnt", ["l2p"], indirect=True)
def test_a_pool_can_be_shown_too(learnt):
    handlers = Handlers(Models(learnt.args.output_dir))
    verdict, _, bars, details = handlers.predict(str(SEVEN))
    assert details["label"] in learnt.model.config.classes and bars.count("<li") == 10 and "together" in verdict
    assert "★</text>" in handlers.look_inside(3, str(SEVEN))[3]
    assert handlers.compare_experts(str(SEVEN)) == ("", None)
    build_demo(learnt.args.output_dir, teaching=True)


@pytest.fixture
def nearest_mean():
    """A stranger's method: no expert, no router, no head."""

    class NearestMean(Method, name="nearest_mean"):
        trains = reads = False

        def __init__(self, backbone, config):
            super().__init__(backbone, config)
            self.register_buffer("means", torch.zeros(0, self.query_size))

        def end(self, features_of):
            features, labels = features_of(self.query)
            new = [features[labels == number].mean(dim=0) for number in self.numbers]
            self.means = torch.cat([self.means, torch.stack(new)])

        def load_state(self, tensors):
            self.means = tensors["means"]

        def classify(self, features, routing):
            return -torch.cdist(features, self.means)

    yield NearestMean.Config()
    del METHODS["nearest_mean"], OPTIONS["nearest_mean"]


def seen(page):
    """What stands above what can be seen of a page."""
    parts = [part["props"] for part in page.get_config_file()["components"] if part["type"] == "markdown"]
    return [part["value"] for part in parts if part.get("visible", True)]


def show(method, folder):
    """Every answer that the demo has for a model of two tasks."""
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    make_trainer(method, folder, num_train_epochs=1).learn_stream(stream)
    handlers = Handlers(Models(str(folder)))
    answers = [*handlers.predict(str(SEVEN)), *handlers.look_inside(2, str(SEVEN))]
    assert f"<b><bdi>{answers[3]['label']}</bdi></b>" in handlers.predict_files([str(SEVEN)])[0]
    return answers, seen(build_demo(str(folder), teaching=True)), handlers.models.served


def test_a_strangers_method_is_shown_without_what_it_has_not(nearest_mean, tmp_path):
    answers, texts, model = show(nearest_mean, tmp_path)
    verdict, likeliest, bars, details, _, _, _, points, _ = answers
    assert details["label"] in model.config.classes and len(likeliest) == 4 and details["expert"] is None
    assert verdict.endswith("<p></p>") and not bars and points is None
    assert not any("Distance" in text or "plane" in text for text in texts)
    assert any("trains the same parameters on every task" in text for text in texts)
    assert "with <bdi>nearest_mean</bdi>: a method of its author" in views.introduction(model, "here")


def test_a_model_whose_pictures_go_to_no_expert_is_shown_with_its_classes(tmp_path):
    answers, texts, model = show(ncm(), tmp_path)
    assert answers[0].endswith("<p></p>") and not answers[2]
    assert answers[7].count("<circle") == 4 and "Task 2 (class 2, class 3)" in answers[7]
    assert "## Class means on the plane in which they spread most" in texts
    assert any(text.startswith("The class_means router weighs") for text in texts)


def test_one_expert_for_all_tasks_is_nothing_to_choose(tmp_path):
    answers, texts, model = show(sequential_lora(), tmp_path)
    assert answers[0].endswith("<p></p>") and answers[3]["expert"] == "all-tasks" and answers[7] is None
    assert not any("Distance" in text or "plane" in text for text in texts)


def test_experts_that_no_picture_chooses_are_not_told(tmp_path):
    class Unrouted(METHODS["s_lora"], name="unrouted"):
        routes, route = False, Method.route  # all go to the first

    try:
        answers, texts, _ = show(Unrouted.Config(k=1), tmp_path)
    finally:
        del METHODS["unrouted"], OPTIONS["unrouted"]
    assert "expert" not in answers[0] and answers[3]["expert"] is None and answers[3]["distance"] == 0
    assert not any("Distance" in text for text in texts)


def test_a_mixed_model_says_who_judged_and_can_be_taught(tmp_path):
    make_trainer(s_lora_mix(mix=2), tmp_path).learn_stream(
        TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    )
    models = Models(str(tmp_path))
    (found,) = models.served.predict(pattern_dataset()["test"][0]["image"], top_k=5)
    assert "Classified by the router and the experts of <b>Task" in views.verdict(found, models.served, 0.05)
    assert views.point_map(models.served, models.served) is not None
    red = [Image.new("RGB", (32, 32), (250, 3 * shade, 3 * shade)) for shade in range(5)]
    old = [row["image"] for row in pattern_dataset()["test"]]
    lesson = teach(models, "", {"red": red}, old)
    assert (lesson.tried, lesson.answers) == (5, len(old)) and lesson.changed <= 1
    assert models.get(lesson.key).predict(Image.new("RGB", (32, 32), (250, 7, 7)))[0].label == "red"


@pytest.mark.parametrize("name", ["slda", "slda_pp"])
def test_what_keeps_sums_of_classes_can_be_taught(name, tmp_path):
    """Also where the first task has trained an expert, which a lesson leaves as it is."""
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    make_trainer(METHODS[name].Config(), tmp_path, num_train_epochs=1).learn_stream(stream)
    models, old = Models(str(tmp_path)), [row["image"] for row in pattern_dataset()["test"]]
    red = [Image.new("RGB", (32, 32), (250, 3 * shade, 3 * shade)) for shade in range(5)]
    assert refusal(models.served) is None
    lesson = teach(models, "", {"red": red}, old)
    assert (lesson.tried, lesson.recognised, lesson.answers, lesson.changed) == (5, 5, len(old), 0)
    (found,) = models.get(lesson.key).predict(Image.new("RGB", (32, 32), (250, 7, 7)))
    assert found.label == "red"
    assert "What is in your picture?" in views.introduction(models.served, "here")
    Path("secret/birds").mkdir(parents=True)
    assert "<bdi>birds</bdi>" in (said := views.introduction(models.served, "secret/birds")) and "secret" not in said
    table = views.file_table([("a.png", "", found)], models.served)
    assert "Expert" not in table and table.count("<th scope") == table.count("<td")


@pytest.mark.parametrize("router, learns", [("prototypes", True), ("gaussian", True), ("linear_ridge", False)])
def test_lessons_are_for_routers_that_keep_what_they_know_of_old_classes(tmp_path, router, learns):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    make_trainer(s_lora(router=router), tmp_path, num_train_epochs=1).learn_stream(stream)
    reason = refusal(Models(str(tmp_path)).served)
    assert reason is None if learns else reason.startswith(f"The {router} router weighs")


def test_a_gaussian_router_measures_distances_to_classes(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    make_trainer(s_lora(router="gaussian"), tmp_path).learn_stream(stream)
    model = Models(str(tmp_path)).served
    (found,) = model.predict(pattern_dataset()["test"][0]["image"], top_k=5)
    assert "the nearest class is" in views.verdict(found, model, 0.05)
    page = build_demo(str(tmp_path), teaching=True).get_config_file()
    texts = [part["props"].get("value") for part in page["components"] if part["type"] == "markdown"]
    assert "## Distance to classes, in order of learning" in texts


def test_a_model_of_one_task_has_a_page_and_its_slider_comes_with_the_second(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    trainer = make_trainer(METHODS["slda"].Config(), tmp_path)
    for task, shown in zip(stream, (False, True), strict=True):
        trainer.learn(task)
        parts = build_demo(str(tmp_path), teaching=True).get_config_file()["components"]
        (slider,) = (part["props"] for part in parts if part["props"].get("elem_id") == "step")
        assert (slider["visible"], slider["value"], slider["maximum"]) == (shown, 1 + shown, 2)
