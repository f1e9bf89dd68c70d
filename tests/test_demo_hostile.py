"""The demo in the hands of those who mean harm: no request ends it, reads its disk, or fetches for them."""

import csv
import json
import urllib.error
import urllib.request
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from conftest import SEVEN
from gradio_client.exceptions import AppError
from PIL import Image
from test_pictures import KINDS, NOISE, archive_of, encode, forged_png


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
        ask("/predict", Path("<img src=x>.png"), "")
    assert "<" not in str(error.value)


@pytest.mark.parametrize("name", PICTURES)
def test_unusual_pictures_are_answered(ask, name):
    Path("upload.png").write_bytes(PICTURES[name])
    assert ask("/predict", Path("upload.png"), "")[3]["expert"].startswith("task-")


def test_a_turned_photo_is_answered_as_if_it_were_upright(ask):
    Image.open(SEVEN).convert("RGB").resize((64, 64)).rotate(90).save("up.png")
    turned = Image.open("up.png").rotate(-90)
    exif = Image.Exif()
    exif[274] = 8  # to be turned by 90 degrees
    turned.save("turned.png", exif=exif)
    upright, found = (ask("/predict", Path(name), "")[3] for name in ("up.png", "turned.png"))
    assert upright == found


@pytest.mark.parametrize("name", NO_PICTURES)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_hostile_uploads_get_a_friendly_answer_and_the_server_lives(ask, name, suffix):
    Path(f"upload{suffix}").write_bytes(NO_PICTURES[name])
    with pytest.raises(AppError, match=r"upload\.(png|svg) .*; (save|make|choose)"):
        ask("/predict", Path(f"upload{suffix}"), "")
    assert ask("/predict", SEVEN, "")[3]["label"] == "7"


def test_hostile_archives_get_a_friendly_answer_and_the_server_lives(ask):
    archive_of({"../../evil.png": encode(NOISE, "PNG")}, "outside.zip")
    archive_of({f"{i}.png": bytes(19 * 2**20) for i in range(12)}, "bomb.zip")
    for name, message in (("outside.zip", "outside of the archive"), ("bomb.zip", "unpacks to more than")):
        with pytest.raises(AppError, match=message):
            ask("/predict_files", [Path(name)], "")
    assert ask("/predict", SEVEN, "")[3]["label"] == "7"


FORMULAS = ["=cmd|' /C calc'!A0.png", "+1.png", "-1+1.png", "@SUM(1).png", "\t=1.png", " =1.png", "\uff1d1.png"]


def test_no_name_becomes_a_formula_of_a_spreadsheet(handlers):
    good = {name: SEVEN.read_bytes() for name in [*FORMULAS, "7-1=6.png"]}
    archive_of({**good, "=HYPERLINK(1).txt": b"no picture"}, "names.zip")
    _, sheet = handlers.predict_files(["names.zip"])
    with open(sheet, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows[:-1]] == [*(f"'{name}" for name in FORMULAS), "7-1=6.png"]
    assert rows[-1]["picture"].startswith("'=") and rows[-1]["problem"].startswith("'=HYPERLINK(1).txt is no picture")
    assert not [text for row in rows for text in row.values() if text.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_no_name_of_a_class_becomes_a_formula(handlers, letters):
    archive_of({f"-1+1/{number}.png": path.read_bytes() for number, path in enumerate(letters[:5])}, "class.zip")
    _, key, _ = handlers.teach("", ["class.zip"])
    _, sheet = handlers.predict_files([str(letters[0])], key)
    with open(sheet, newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["answer"] == "'-1+1"


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
    calls = {
        "predict": [payload, ""],
        "compare_experts": [payload, ""],
        "predict_files": [[payload], ""],
        "scan_drawing": [drawing],
    }
    for endpoint, data in (calls | {"teach": ["cat", [payload] * 3, ""], "give_back": [payload]}).items():
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
        "predict": [picture, ""],
        "compare_experts": [picture, ""],
        "scan_drawing": [drawing],
        "predict_files": [[picture], ""],
        "look_inside": [2, picture, ""],
        "teach": ["cat", None, ""],  # refused for want of pictures
        "add_drawing": [drawing, [picture]],
        "give_back": [picture],
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
    with pytest.raises(AppError, match="step must be of type"):
        ask("/look_inside", "the first", None, "")
    assert ask("/predict", SEVEN, "")[3]["label"] == "7"


def test_functions_answer_or_refuse_values_of_any_type_in_words(handlers):
    for name, good in requests_of(str(SEVEN)).items():
        for arguments in with_wrong(WRONG, good):
            try:
                getattr(handlers, name)(*arguments)
            except gr.Error as error:
                assert str(error.message).endswith(".") and "\n" not in str(error.message)
    assert handlers.predict(str(SEVEN))[3]["label"] == "7"
