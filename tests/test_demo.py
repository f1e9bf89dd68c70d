"""The demo's endpoints, called as strangers call them."""

import copy
import json
import shutil
import sys
import threading
import urllib.error
import urllib.request
import weakref
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import make_trainer, pattern_dataset
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import HfApi
from PIL import Image, ImageDraw
from test_pictures import KINDS, NOISE, archive_of, encode, forged_png

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    Method,
    TaskStream,
    ncm,
    s_lora,
    s_lora_mix,
    sequential_lora,
)
from hf_clpeft.backbones.bundled import DIGITS_MODEL, bundled_folder
from hf_clpeft.cli.demo import demo as demo_command
from hf_clpeft.config.method import OPTIONS
from hf_clpeft.demo import views
from hf_clpeft.demo.app import build_demo
from hf_clpeft.demo.batching import Batcher
from hf_clpeft.demo.handlers import Handlers
from hf_clpeft.demo.models import Models
from hf_clpeft.demo.pictures import VisitorError
from hf_clpeft.demo.teaching import sort_pictures, teach
from hf_clpeft.streams import PictureError


EXAMPLES = sorted((bundled_folder(DIGITS_MODEL) / "examples").glob("*.png"))
SEVEN = EXAMPLES[7]


@pytest.fixture(scope="module")
def digits():
    return ContinualModel.from_pretrained(DIGITS_MODEL)


@pytest.fixture(scope="module")
def client(page):
    # Without TLS to speak, its client need not load certificates for every request.
    return Client(page, verbose=False, ssl_verify=False)


@pytest.fixture(scope="module")
def handlers():
    return Handlers(Models(DIGITS_MODEL))


@pytest.fixture
def ask(client):
    """Calls an endpoint; paths become uploads."""

    def call(endpoint, *arguments):
        def upload(value):
            if isinstance(value, Path):
                return handle_file(str(value))
            return [upload(item) for item in value] if isinstance(value, list) else value

        return client.predict(*map(upload, arguments), api_name=endpoint)

    return call


def test_every_function_has_an_endpoint_with_types_and_a_description(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {"predict", "scan_drawing", "predict_files", "look_inside", "teach", "add_drawing", "push"}
    assert endpoints.keys() == {f"/{name}" for name in names}
    for endpoint in endpoints.values():
        assert len(endpoint["description"]) > 20
        assert "http" not in json.dumps([parameter["example_input"] for parameter in endpoint["parameters"]])
        for parameter in endpoint["parameters"]:
            assert parameter["label"] and parameter["python_type"]["type"]


def test_an_answer_is_the_models_with_its_reasons(ask, digits):
    verdict, likeliest, bars, details = ask("/predict", SEVEN, "nearest", "")
    (found,) = digits.predict(SEVEN, top_k=5, reject_rate=0.05)
    assert details == json.loads(json.dumps(vars(found)))
    assert likeliest["label"] == "7" and len(likeliest["confidences"]) == 5
    assert "<b>7</b>" in verdict and "expert of <b>6, 7</b>" in verdict
    assert [row[0] for row in bars["data"]] == [task.title for task in digits.config.tasks]
    assert [row[2] for row in bars["data"]].index("chosen") == 3


def test_another_expert_can_be_chosen_by_hand(ask, digits):
    verdict, _, _, details = ask("/predict", SEVEN, "task-000", "")
    assert details["expert"] == "task-000" and "Routing alone would have chosen 6, 7." in verdict
    with pytest.raises(AppError, match="not one of task-000"):
        ask("/predict", SEVEN, "task-777", "")


def test_what_is_no_digit_is_of_no_task(ask, letters):
    verdict, _, _, details = ask("/predict", letters[-1], "nearest", "")
    assert details["label"] is None and "none of my tasks" in verdict


def test_a_drawing_is_scanned_like_the_training_data(ask):
    drawing = Image.new("RGB", (280, 280), "white")
    ImageDraw.Draw(drawing).line([(140, 60), (140, 220)], fill="black", width=30)
    drawing.save("one.png")
    picture = ask("/scan_drawing", {"background": None, "layers": [], "composite": handle_file("one.png")})
    assert ask("/predict", Path(picture), "nearest", "")[3]["label"] == "1"
    lessons = ask("/add_drawing", {"background": None, "layers": [], "composite": handle_file("one.png")}, [SEVEN])
    assert [Path(lesson).name for lesson in lessons] == ["digit-7.png", "drawing-2.png"]
    assert np.array_equal(Image.open(lessons[1]), Image.open(picture))
    Image.new("RGB", (280, 280), "white").save("nothing.png")
    with pytest.raises(AppError, match="nothing on the canvas"):
        ask("/scan_drawing", {"background": None, "layers": [], "composite": handle_file("nothing.png")})


def test_many_pictures_give_a_table_with_problems_in_their_rows(ask):
    archive_of({**{f"digits/{p.name}": p.read_bytes() for p in EXAMPLES}, "notes.txt": b"nothing"}, "all.zip")
    table, sheet = ask("/predict_files", [Path("all.zip"), SEVEN], "")
    answers = {row[0]: row[1] for row in table["data"]}
    assert answers["digits/digit-3.png"] == "3" and answers["digit-7.png"] == "7" and len(table["data"]) == 12
    problems = [row for row in table["data"] if row[-1]]
    assert len(problems) == 1 and "notes.txt is no picture" in problems[0][-1]
    assert Path(sheet).read_text().splitlines()[0] == "picture,answer,score,expert,distance,typicality,problem"


def test_the_model_can_be_seen_as_it_was_after_each_task(ask):
    learnt, matrix, routing, points, answer = ask("/look_inside", 2, SEVEN, "")
    assert learnt.count("class=later") == 3 and matrix.count("<td") == 4 and routing.count("<td") == 25
    assert {row[2] for row in points["data"]} == {"0, 1", "2, 3", "your picture"}
    assert answer["label"] != "7" and not ask("/look_inside", 5, None, "")[4]


def test_a_taught_class_is_recognised_and_every_old_answer_stays(ask, letters, digits):
    outcome, key, archive = ask("/teach", "letter A", list(letters[:5]), "")
    assert "Learnt <b>letter A</b> (5 pictures) as task-005" in outcome and "10 of 10 answers" in outcome
    for letter in letters[5:8]:
        assert ask("/predict", letter, "nearest", key)[3]["label"] == "letter A"
        assert ask("/predict", letter, "nearest", "")[3]["label"] != "letter A"  # nobody else's model has changed
    shutil.unpack_archive(archive, "taught")
    taught = ContinualModel.from_pretrained("taught")
    assert taught.predict(EXAMPLES) == digits.predict(EXAMPLES)
    assert taught.config.classes[-1] == "letter A"
    with pytest.raises(AppError, match="knows 'letter A' already"):
        ask("/teach", "letter A", list(letters[:5]), key)
    outcome, _, _ = ask("/teach", "letter X", [letters[8]] * 3, key)
    assert "task-006" in outcome


def test_folders_in_an_archive_are_classes_that_are_trained(ask, letters):
    members = {f"set/{'A' if 'A-' in p.name else 'X'}/{i}.png": p.read_bytes() for i, p in enumerate(letters)}
    archive_of(members | {f"set/X/{i}.png": letters[8].read_bytes() for i in range(20, 22)}, "letters.zip")
    outcome, key, _ = ask("/teach", "", [Path("letters.zip")], "")
    assert "<b>A</b> (8 pictures), <b>X</b> (3 pictures)" in outcome
    assert ask("/predict", letters[8], "nearest", key)[3]["label"] == "X"


def test_a_taught_model_is_pushed_with_the_visitors_own_token_only(ask, letters, hub, monkeypatch):
    _, key, _ = ask("/teach", "letter A", list(letters[:3]), "")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")  # of whoever runs the server
    for token, key_, message in (("", key, "your own token"), ("hf_alice", "", "Teach a class first")):
        with pytest.raises(AppError, match=message):
            ask("/push", "alice/letters", token, key_)
    with pytest.raises(AppError) as refused:
        ask("/push", "alice/letters", "hf_wrong", key)
    assert "hf_wrong" not in str(refused.value)
    assert "alice/letters" in ask("/push", "alice/letters", "hf_alice", key)
    assert ContinualModel.from_pretrained("alice/letters").config.classes[-1] == "letter A"


def pictures(count, folder=""):
    return [(f"{folder}{i}.png", Image.new("RGB", (8, 8))) for i in range(count)]


@pytest.mark.parametrize(
    "name, uploads, message",
    [
        ("cat", [], "no picture yet"),
        ("cat", pictures(2), "'cat' has 2 pictures; give 3 or more"),
        ("", pictures(3), "a name of 1 to 40 letters"),
        ("<script>", pictures(3), "a name of 1 to 40 letters"),
        ("7", pictures(3), "knows '7' already"),
        ("cat", pictures(201), "at most 200"),
        ("", [item for i in range(21) for item in pictures(3, f"class {i}/")], "63 pictures of 21 classes"),
        ("cat", [*pictures(3), ("x.svg", VisitorError("x.svg is an SVG drawing"))], "SVG drawing"),
    ],
)
def test_what_cannot_be_taught_says_why(name, uploads, message):
    with pytest.raises(VisitorError, match=message):
        sort_pictures(name, uploads, known=["7"])


PICTURES = {
    "animated GIF": KINDS["animated GIF"][0],
    "16-bit": encode(Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16)), "PNG"),
    "CMYK": KINDS["CMYK"][0],
    "palette with alpha": KINDS["clear palette"][0],
}
NO_PICTURES = {
    "no image": b"nothing of the kind",
    "truncated": encode(NOISE, "PNG")[:400],
    "1 x 1": encode(Image.new("RGB", (1, 1)), "PNG"),
    "bomb": forged_png(20_000, 20_000),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
}


def test_a_file_name_does_not_become_a_part_of_the_page(ask):
    Path("<img src=x>.png").write_bytes(b"nothing")
    with pytest.raises(AppError) as error:
        ask("/predict", Path("<img src=x>.png"), "nearest", "")
    assert "<" not in str(error.value)


@pytest.mark.parametrize("name", PICTURES)
def test_unusual_pictures_are_answered(ask, name):
    Path("upload.png").write_bytes(PICTURES[name])
    assert ask("/predict", Path("upload.png"), "nearest", "")[3]["expert"].startswith("task-")


def test_a_turned_photo_is_answered_as_if_it_were_upright(ask):
    Image.open(SEVEN).convert("RGB").resize((64, 64)).rotate(90).save("up.png")
    turned = Image.open("up.png").rotate(-90)
    exif = Image.Exif()
    exif[274] = 8  # to be turned by 90 degrees
    turned.save("turned.png", exif=exif)
    upright, found = (ask("/predict", Path(name), "nearest", "")[3] for name in ("up.png", "turned.png"))
    assert upright == found


@pytest.mark.parametrize("name", NO_PICTURES)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_hostile_uploads_get_a_friendly_answer_and_the_server_lives(ask, name, suffix):
    Path(f"upload{suffix}").write_bytes(NO_PICTURES[name])
    with pytest.raises(AppError, match=r"upload\.(png|svg) .*; (save|make|choose)"):
        ask("/predict", Path(f"upload{suffix}"), "nearest", "")
    assert ask("/predict", SEVEN, "nearest", "")[3]["label"] == "7"


def test_hostile_archives_get_a_friendly_answer_and_the_server_lives(ask):
    archive_of({"../../evil.png": encode(NOISE, "PNG")}, "outside.zip")
    archive_of({f"{i}.png": bytes(19 * 2**20) for i in range(12)}, "bomb.zip")
    for name, message in (("outside.zip", "outside of the archive"), ("bomb.zip", "unpacks to more than")):
        with pytest.raises(AppError, match=message):
            ask("/predict_files", [Path(name)], "")
    assert ask("/predict", SEVEN, "nearest", "")[3]["label"] == "7"


@pytest.mark.parametrize(
    "payload",
    [
        {"path": "/etc/passwd"},
        {"path": "/etc/passwd", "orig_name": "x.svg"},
        {"path": "https://example.org/x.png", "meta": {"_type": "gradio.FileData"}},
        {"url": "https://example.org/x.png", "meta": {"_type": "gradio.FileData"}},
    ],
)
def test_no_request_makes_the_server_read_or_fetch_what_was_not_uploaded(page, payload):
    drawing = {"background": None, "layers": [], "composite": payload}
    calls = {"predict": [payload, "nearest", ""], "predict_files": [[payload], ""], "scan_drawing": [drawing]}
    for endpoint, data in (calls | {"teach": ["cat", [payload] * 3, ""]}).items():
        address, call = f"{page}gradio_api/call/{endpoint}", json.dumps({"data": data}).encode()
        request = urllib.request.Request(address, call, {"Content-Type": "application/json"})
        event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
        answer = urllib.request.urlopen(f"{address}/{event}", timeout=60).read().decode()
        assert "event: error" in answer and "root:" not in answer
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{page}gradio_api/file=https://example.org/x.png", timeout=60)


WRONG = [None, [], ["x"], [[[]]], {}, {"path": ["x"]}, 5, -1.5, float("nan"), True, "x" * 9999, "\ud800"]


def requests_of(picture):
    """A good request to each function."""
    drawing = {"background": None, "layers": [], "composite": picture} if isinstance(picture, dict) else picture
    return {
        "predict": [picture, "nearest", ""],
        "scan_drawing": [drawing],
        "predict_files": [[picture], ""],
        "look_inside": [2, picture, ""],
        "teach": ["cat", None, ""],  # refused for want of pictures
        "add_drawing": [drawing, [picture]],
        "push": ["alice/x", "hf_wrong", ""],  # and of a model
    }


def with_wrong(values, arguments):
    for i in range(len(arguments)):
        yield from ([*arguments[:i], value, *arguments[i + 1 :]] for value in values)


def test_values_of_any_json_type_are_refused_and_the_server_lives(page, ask):
    upload = urllib.request.Request(
        f"{page}gradio_api/upload",
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="7.png"\r\n\r\n%b\r\n--x--'
        % SEVEN.read_bytes(),
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    [path] = json.load(urllib.request.urlopen(upload, timeout=60))
    for endpoint, good in requests_of({"path": path, "meta": {"_type": "gradio.FileData"}}).items():
        for data in with_wrong(WRONG[1::3], good):
            address, call = f"{page}gradio_api/call/{endpoint}", json.dumps({"data": data}).encode()
            request = urllib.request.Request(address, call, {"Content-Type": "application/json"})
            event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
            answer = urllib.request.urlopen(f"{address}/{event}", timeout=60).read().decode()
            assert "event: error" in answer or "event: complete" in answer
    with pytest.raises(AppError, match="expert must be of type"):
        ask("/predict", SEVEN, ["task-000"], "")
    assert ask("/predict", SEVEN, "nearest", "")[3]["label"] == "7"


def test_functions_answer_or_refuse_values_of_any_type_in_words(handlers):
    for name, good in requests_of(str(SEVEN)).items():
        for arguments in with_wrong(WRONG, good):
            try:
                getattr(handlers, name)(*arguments)
            except gr.Error as error:
                assert str(error.message).endswith(".") and "\n" not in str(error.message)
    assert handlers.predict(str(SEVEN))[3]["label"] == "7"


def test_no_request_ends_the_batching_thread(digits):
    batcher, image = Batcher(), Image.open(SEVEN)
    for options in ({"expert": ["task-000"]}, {"expert": {}}, {"top_k": 0}, {"reject_rate": "0.1"}):
        with pytest.raises(ConfigError, match="|".join(options)):
            batcher.predict(digits, [image], **options)
    with pytest.raises(PictureError, match="is of type NoneType"):
        batcher.predict(digits, [None])
    jobs = [(digits, [("expert", [])]), (digits, (("no_option", 1),)), None, 5]
    pixels = digits.backbone.transform.resize([image])
    waiting = [Future() for _ in jobs]
    for job, future in zip(jobs, waiting, strict=True):  # what predict lets nobody ask
        batcher._waiting.put((job, pixels, future))
    for future in waiting:
        with pytest.raises((TypeError, ValueError)):
            future.result(timeout=60)
    with pytest.raises(SystemExit):
        batcher.run(lambda: sys.exit("no"))
    assert batcher.predict(digits, [image])[0].label == "7"


def test_tasks_of_one_title_have_a_bar_and_a_name_each(digits):
    digits = copy.copy(digits)
    digits.config = copy.deepcopy(digits.config)
    first, second, third, fourth, _ = digits.config.tasks
    first.domain = second.domain = "photos"
    third.domain, fourth.domain = "photos (task-000)", views.PICTURE
    names = views.titles(digits)
    assert len(set(names.values()) | {views.PICTURE}) == 6 and "photos" in names["task-001"]
    assert len(views.colours(digits)) == 6
    (found,) = digits.predict(SEVEN, top_k=5)
    assert [row[0] for row in views.distance_bars(found, digits)["data"]] == list(names.values())


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
    assert len(table) == 70 and Picture.most < 4 and table["answer"].notna().all()


def test_pictures_to_teach_from_fit_into_memory():
    big = Image.new("1", (20_000, 20_000))
    with pytest.raises(VisitorError, match="more than 800 megapixels together"):
        sort_pictures("cat", [(f"{number}.png", big) for number in range(3)], known=[])


def test_concurrent_visitors_get_their_own_answers(page):
    wrong = []

    def visit(number):
        visitor = Client(page, verbose=False, ssl_verify=False)
        for turn in range(5):
            digit = (7 * number + 3 * turn) % 10
            found = visitor.predict(handle_file(str(EXAMPLES[digit])), "nearest", "", api_name="/predict")[3]
            if found["label"] != str(digit):
                wrong.append((number, digit, found))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(12)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert not wrong


def test_the_command_starts_the_page(monkeypatch, saved):
    asked = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda demo, **options: asked.update(options, demo=demo))
    demo_command(str(saved), host="0.0.0.0", port=7000, browser=False, teaching=False)
    assert (asked["server_name"], asked["server_port"], asked["inbrowser"]) == ("0.0.0.0", 7000, False)
    named = {function.api_name for function in asked["demo"].fns.values()}
    assert "predict" in named and not named & {"teach", "push", "add_drawing", "scan_drawing"}


def test_visitors_with_different_models_and_wishes_share_the_batcher(digits):
    batcher, image = Batcher(), Image.open(SEVEN).convert("RGB")
    (alone,), (other,) = digits.predict(image, top_k=2), digits.predict(image, expert="task-000")
    broken = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    results = {}

    def visit(number):
        try:
            if number % 3 == 0:
                results[number] = batcher.predict(broken, [image])
            else:
                options = {"top_k": 2} if number % 3 == 1 else {"expert": "task-000"}
                results[number] = batcher.predict(digits, [image] * 2, **options)
        except RuntimeError as error:
            results[number] = str(error)

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(24)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for number, found in results.items():
        if number % 3 == 0:
            assert "learnt no task yet" in found
        else:
            expected = alone if number % 3 == 1 else other
            assert [(p.label, p.expert, list(p.classes)) for p in found] == [
                (expected.label, expected.expert, list(expected.classes))
            ] * 2


def test_the_past_of_a_model_on_the_hub_comes_from_its_tags(hub):
    stream = TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)
    options = {"push_to_hub": True, "hub_model_id": "alice/model", "hub_token": "hf_alice", "num_train_epochs": 1}
    make_trainer(s_lora(k=1), **options).learn_stream(stream)
    models = Models("alice/model")
    past, pulled = models.after("", 2), ContinualModel.from_pretrained("alice/model", revision="task-001")
    models._tags = []  # as without a network
    without = models._past("", models.served, 2)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pulled(pixels).logits
        assert torch.equal(past(pixels).logits, expected) and torch.equal(without(pixels).logits, expected)
    with pytest.raises(ConfigError, match="none after task 4"):
        models.after("", 4)


def test_a_branch_is_not_shown_with_the_past_of_another(hub):
    first, second, third = TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)
    options = {"push_to_hub": True, "hub_model_id": "alice/model", "hub_token": "hf_alice", "num_train_epochs": 1}
    make_trainer(s_lora(k=1), **options).learn_stream(TaskStream([first, second]))
    HfApi(token="hf_alice").create_branch("alice/model", branch="other", revision=first.name)
    shutil.rmtree("out")
    model = ContinualModel.from_pretrained("alice/model", revision="other")
    trainer = ContinualTrainer(model, ContinualTrainingArguments("out", hub_revision="other", **options))
    trainer.learn(replace(third, name=second.name))
    trainer.learn(replace(second, name=third.name))
    models = Models("alice/model", revision="other")
    assert models.after("", 2).config.tasks == models.served.config.tasks[:2]


@pytest.mark.parametrize("learnt", ["l2p"], indirect=True)
def test_a_pool_can_be_shown_too(learnt):
    handlers = Handlers(Models(learnt.args.output_dir))
    verdict, _, bars, details = handlers.predict(str(SEVEN))
    assert details["label"] in learnt.model.config.classes and len(bars["data"]) == 10 and "together" in verdict
    assert handlers.look_inside(3, str(SEVEN))[3]["data"][-1][2] == "your picture"
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
    assert handlers.predict_files([str(SEVEN)])[0]["answer"].tolist() == [answers[3]["label"]]
    return answers, seen(build_demo(str(folder), teaching=True)), handlers.models.served


def test_a_strangers_method_is_shown_without_what_it_has_not(nearest_mean, tmp_path):
    answers, texts, model = show(nearest_mean, tmp_path)
    verdict, likeliest, bars, details, _, _, _, points, _ = answers
    assert details["label"] in model.config.classes and len(likeliest) == 4 and details["expert"] is None
    assert verdict.endswith("<p></p>") and not bars["data"] and points is None
    assert not any("Distance" in text or "plane" in text for text in texts)
    assert any("trains the same parameters on every task" in text for text in texts)
    assert "with nearest_mean: a method of its author" in views.introduction(model, "here")


def test_a_model_whose_pictures_go_to_no_expert_is_shown_with_its_classes(tmp_path):
    answers, texts, model = show(ncm(), tmp_path)
    assert answers[0].endswith("<p></p>") and not answers[2]["data"]
    assert {row[2] for row in answers[7]["data"]} == {"class 0, class 1", "class 2, class 3", "your picture"}
    assert "#### Class means on the plane in which they spread most" in texts
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


def test_a_mixed_model_says_who_judged_and_cannot_be_taught(tmp_path):
    make_trainer(s_lora_mix(mix=2), tmp_path).learn_stream(
        TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    )
    models = Models(str(tmp_path))
    (found,) = models.served.predict(pattern_dataset()["test"][0]["image"], top_k=5)
    assert "Classified by the router and the experts of <b>class" in views.verdict(found, models.served, 0.05)
    assert views.prototype_points(models.served) is not None
    with pytest.raises(ConfigError, match="weighs the classes of all tasks against each other"):
        teach(models, "", {"new": [Image.new("RGB", (32, 32))] * 5})


def test_a_gaussian_router_measures_distances_to_classes(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    make_trainer(s_lora(router="gaussian"), tmp_path).learn_stream(stream)
    model = Models(str(tmp_path)).served
    (found,) = model.predict(pattern_dataset()["test"][0]["image"], top_k=5)
    assert "the nearest class is" in views.verdict(found, model, 0.05)
    page = build_demo(str(tmp_path), teaching=True).get_config_file()
    texts = [part["props"].get("value") for part in page["components"] if part["type"] == "markdown"]
    assert "#### Distance to the nearest class of each task" in texts
    assert any(text.startswith("The gaussian router weighs") for text in texts)
