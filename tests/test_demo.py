"""The demo's endpoints, called as strangers call them."""

import copy
import csv
import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, SEVEN
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageDraw
from test_pictures import archive_of

from hf_clpeft.cli.demo import demo as demo_command
from hf_clpeft.demo import views
from hf_clpeft.demo.handlers import keep
from hf_clpeft.prediction import Prediction


def test_every_function_has_an_endpoint_with_types_and_a_description(ask):
    endpoints = ask.client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = "predict explain compare_experts predict_files look_inside teach give_back push".split()
    assert endpoints.keys() == {f"/{name}" for name in [*names, "scan_drawing", "add_drawing"]}
    for endpoint in endpoints.values():
        assert len(endpoint["description"]) > 20
        assert "http" not in json.dumps([parameter["example_input"] for parameter in endpoint["parameters"]])
        for parameter in endpoint["parameters"]:
            assert parameter["label"] and parameter["python_type"]["type"]


def test_an_answer_is_the_models_with_its_reasons(ask, digits):
    verdict, likeliest, bars, details = ask("/predict", SEVEN, "")
    (found,) = digits.predict(SEVEN, top_k=5, reject_rate=0.05)
    assert details == json.loads(json.dumps(vars(found)))
    shown = [score for score in found.classes.values() if score >= 0.005]  # others would be "0 %"
    assert likeliest["label"] == "7" and [row["confidence"] for row in likeliest["confidences"]] == shown[:5]
    assert "<b><bdi>7</bdi></b>" in verdict and 'expert of <b>Task 4</b> <bdi title="6, 7">6, 7</bdi>' in verdict
    assert [text[:6] for text in bars.split("<b>")[1:]] == [f"Task {number}" for number in range(1, 6)]
    assert "<li class=chosen><span class=who><b>Task 4</b>" in bars and bars.count("chosen</em>") == 1


def test_a_route_says_how_often_it_was_right(ask, digits):
    verdict = ask("/predict", SEVEN, "")[0]
    came = np.array(digits.report.routing_confusion)[:, 3]
    assert f"Of {came.sum()} test pictures that came to this expert, {100 * came[3] / came.sum():.0f} %" in verdict


@pytest.mark.parametrize("second, said", [(1.02, "a close call"), (1.1, "fairly clear"), (2.0, "clear")])
def test_the_words_for_a_route_are_measured_on_test_pictures(digits, second, said):
    digits = copy.copy(digits)
    digits.report = copy.deepcopy(digits.report)
    digits.report.route_margins = [[20, 11], [40, 30], [100, 99]]
    found = Prediction("7", 0.9, "task-003", 1.0, None, {"7": 0.9, "1": 0.1}, {"task-003": 1.0, "task-000": second})
    shares = {"a close call": "Of 20", "fairly clear": "Of 40", "clear": "Of 100"}
    share = {"a close call": 55, "fairly clear": 75, "clear": 99}[said]
    verdict = views.verdict(found, digits, 0.05)
    assert f"The route is {said}:" in verdict
    assert f"{shares[said]} test pictures with such a route, {share} % came right." in verdict


def test_the_nearest_experts_answer_side_by_side(ask, digits):
    cards, said = ask("/compare_experts", SEVEN, "")
    nearest = list(digits.predict(SEVEN, top_k=3)[0].experts)
    assert list(said) == nearest and cards.count("<li>") == 3 and cards.count(", the nearest") == 1
    for name in nearest:
        assert said[name]["label"] == digits.predict(SEVEN, expert=name)[0].label


def test_what_is_no_digit_is_not_recognised(ask, letters):
    verdict, likeliest, _, details = ask("/predict", letters[-1], "")
    assert details["label"] is None and not likeliest
    assert "<b>Not recognised</b> <small>unlike anything learnt" in verdict and "100 %" not in verdict
    assert "Not recognised</b>, unlike anything learnt" in ask("/look_inside", 5, letters[-1], "")[4]


@pytest.mark.parametrize(
    "scores, said",
    [
        ((0.97, 0.03), "97 %"),
        ((0.7, 0.3), "70 %, probably"),
        ((0.4, 0.3), "40 %, unsure: perhaps <bdi>b"),
    ],
)
def test_low_confidence_has_words(digits, scores, said):
    digits = copy.copy(digits)
    digits.report = None  # nothing was measured
    found = Prediction("a", scores[0], None, 0.0, None, dict(zip("ab", scores, strict=True)), {})
    assert f"<small>{said}" in views.verdict(found, digits, 0.05)


def test_a_file_that_is_being_served_is_replaced_and_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    place = Path(keep(b"picture", "a.png"))
    with place.open("rb") as served:
        before = place.stat().st_ino
        assert keep(b"picture", "a.png") == str(place) and place.stat().st_ino != before
        assert served.read() == b"picture"
    assert [path.name for path in tmp_path.iterdir()] == [place.parent.name]


def test_a_name_of_many_classes_ends_a_sentence_with_one_full_stop(digits):
    digits = copy.copy(digits)
    digits.config = copy.deepcopy(digits.config)
    digits.config.tasks[3].classes = ["4", "5", "6", "7"]
    (found,) = digits.predict(SEVEN, top_k=5)
    assert "4, 5, 6, …</bdi> The route" in views.verdict(found, digits, 0.05)


def test_a_class_that_was_weighed_against_nothing_has_no_confidence(digits):
    digits = copy.copy(digits)
    digits.config = copy.deepcopy(digits.config)
    digits.config.tasks[3].classes = ["7"]
    (found,) = digits.predict(SEVEN, top_k=5)
    assert "<small>the only class of its task</small>" in views.verdict(found, digits, 0.05)


def test_a_confidence_is_measured_against_test_pictures(digits, monkeypatch):
    digits = copy.copy(digits)
    digits.report = copy.deepcopy(digits.report)
    digits.report.reliability = [[0, 0, 0]] * 13 + [[40, 36.0, 30], [19, 18.9, 19]]
    found = Prediction("a", 0.9, None, 0.0, None, {"a": 0.9, "b": 0.1}, {})
    said = views.verdict(found, digits, 0.05)
    assert (
        "75 %, probably" in said and "Of 40 test pictures answered about as surely, 75 % were answered right;" in said
    )
    assert "own score, 90 %, is not calibrated" in said
    monkeypatch.setattr(type(digits.method), "temperature", lambda method: 2.0)
    said = views.verdict(found, digits, 0.05)
    assert "<small>90 %" in said and "75 % were answered right." in said
    assert "test pictures" not in views.verdict(replace(found, score=0.99), digits, 0.05)  # too few to say


def test_a_drawing_is_scanned_like_the_training_data(ask):
    drawing = Image.new("RGB", (280, 280), "white")
    ImageDraw.Draw(drawing).line([(140, 60), (140, 220)], fill="black", width=30)
    drawing.save("one.png")
    picture = ask("/scan_drawing", {"background": None, "layers": [], "composite": handle_file("one.png")})
    assert ask("/predict", Path(picture), "")[3]["label"] == "1"
    lessons = ask("/add_drawing", {"background": None, "layers": [], "composite": handle_file("one.png")}, [SEVEN])
    assert [Path(lesson).name for lesson in lessons] == ["digit-7.png", "drawing-2.png"]
    assert np.array_equal(Image.open(lessons[1]), Image.open(picture))
    Image.new("RGB", (280, 280), "white").save("nothing.png")
    with pytest.raises(AppError, match="nothing on the canvas"):
        ask("/scan_drawing", {"background": None, "layers": [], "composite": handle_file("nothing.png")})


def test_many_pictures_give_a_table_with_problems_in_their_rows(ask):
    archive_of({**{f"digits/{p.name}": p.read_bytes() for p in EXAMPLES}, "notes.txt": b"nothing"}, "all.zip")
    table, sheet = ask("/predict_files", [Path("all.zip"), SEVEN], "")
    with open(sheet, newline="") as file:
        rows = list(csv.DictReader(file))
    answers = {row["picture"]: row["answer"] for row in rows}
    assert answers["digits/digit-3.png"] == "3" and answers["digit-7.png"] == "7" and len(rows) == 12
    assert list(rows[0]) == "picture answer score expert distance typicality problem".split()
    problems = [row for row in rows if row["problem"]]
    assert len(problems) == 1 and "notes.txt is no picture" in problems[0]["problem"]
    assert table.count("<tr>") == 13 and table.count("<img src=") == 11 and "notes.txt is no picture" in table
    assert "<b>Task 4</b>" in table and "task-003" not in table


def test_the_model_can_be_seen_as_it_was_after_each_task(ask):
    learnt, matrix, routing, points, answer = ask("/look_inside", 2, SEVEN, "")
    assert learnt.count("class=later") == 3 and matrix.count("<td") == 4 and "measured after task 5" in routing
    assert points.count("<circle") == 40 and points.count("★</text>") == 1 and "<bdi>7<" not in answer
    assert ask("/look_inside", 5, SEVEN, "")[2].count("<td") == 25 and not ask("/look_inside", 5, None, "")[4]


def test_the_map_stays_in_place_when_the_slider_moves(ask):
    places = [re.findall(r"cx=\S+ cy=\S+", ask("/look_inside", step, None, "")[3]) for step in (2, 3, 5)]
    assert places[2][:60] == places[1] and places[1][:40] == places[0]


def test_names_from_strangers_are_told_apart_and_stay_text(digits):
    digits = copy.copy(digits)
    digits.config = copy.deepcopy(digits.config)
    first, second, *_ = digits.config.tasks
    first.domain, second.domain = "photos", "photos"
    digits.config.tasks[2].domain = "<img src=x>\u202e"
    (found,) = digits.predict(SEVEN, top_k=5)
    bars = views.distance_bars(found, digits)
    assert bars.count("<li") == 5 and bars.count(">photos</bdi>") == 2 and "<b>Task 2</b>" in bars
    for part in (bars, views.learnt(digits, 5), views.accuracy_table(digits, 5), views.point_map(digits, digits)):
        assert "<img" not in part and "\u202e" not in part and "&lt;img" in part


def test_many_pictures_are_not_in_memory_at_once(handlers, monkeypatch):
    class Picture:
        alive, most = 0, 0

    def read_uploads(files):
        for number in range(70):
            image = Image.new("RGB", (8, 8))
            Picture.alive += 1
            Picture.most = max(Picture.most, Picture.alive)
            weakref.finalize(image, lambda: setattr(Picture, "alive", Picture.alive - 1))
            yield f"{number}.png", image
            del image

    monkeypatch.setattr("hf_clpeft.demo.handlers.read_uploads", read_uploads)
    table, _ = handlers.predict_files(["all.zip"])
    assert table.count("<img src=") == 70 and Picture.most < 4 and "None" not in table


def test_the_command_starts_the_page(monkeypatch, saved):
    asked = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda demo, **options: asked.update(options, demo=demo))
    demo_command(str(saved), host="0.0.0.0", port=7000, browser=False, teaching=False)
    assert (asked["server_name"], asked["server_port"], asked["inbrowser"]) == ("0.0.0.0", 7000, False)
    named = {function.api_name for function in asked["demo"].fns.values()}
    assert "predict" in named and not named & {"teach", "push", "add_drawing", "scan_drawing"}


def test_the_page_begins_with_what_it_recognises(digits):
    said = views.introduction(digits, "here")
    assert "recognises 10 things: <bdi>0</bdi>, " in said and "<bdi>9</bdi>. <b>Give it" in said
    digits = copy.copy(digits)
    digits.config = copy.deepcopy(digits.config)
    digits.config.tasks[-1].classes = ["8", "9", "<b>" * 20, "letter A"]
    digits.config.classes[10:] = ["<b>" * 20, "letter A"]
    said = views.introduction(digits, "here", taught=True)
    assert "12 things" in said and "<bdi>9</bdi>, … and <bdi>letter A</bdi>, which you taught. <b>Give" in said


@pytest.mark.parametrize(
    "p_value, said",
    [
        (1.0, "typical: of 100 pictures like those it learnt, all "),
        (0.35, "typical: .*about 35 "),
        (0.0, "unusual: .*fewer than 1 "),
    ],
)
def test_how_typical_a_picture_is_has_words(digits, p_value, said):
    found = Prediction("a", 0.9, None, 0.0, p_value, {"a": 0.9, "b": 0.1}, {})
    assert re.search(
        f"It looks {said}would lie as far away as this one, or farther", views.verdict(found, digits, 0.05)
    )
