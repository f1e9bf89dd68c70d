"""The handler that a repo carries for Inference Endpoints, as their toolkit finds and calls it."""

import base64
import importlib.util
import io
import json
import shutil
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import PIL.Image
import pytest
from conftest import EXAMPLES, SEVEN
from huggingface_hub import HfApi

from hf_clpeft import ContinualModel
from hf_clpeft.backbones.bundled import ASSETS, DIGITS_MODEL, bundled_folder
from hf_clpeft.hub.push import PushTarget, push_folder


def load(folder):
    """An instance of the class of that name in `handler.py`, made with the path of the repo, as the toolkit does."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def handler(tmp_path_factory):
    folder = shutil.copytree(bundled_folder(DIGITS_MODEL), tmp_path_factory.mktemp("repo") / "model")
    shutil.copy(ASSETS / "endpoint" / "handler.py", folder)
    return load(folder)


@pytest.fixture(scope="module")
def endpoint(handler):
    """A server as the toolkit's: JSON as it is, images as PIL images; errors with status 400."""

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                if self.headers["Content-Type"].startswith("image/"):
                    data = {"inputs": PIL.Image.open(io.BytesIO(body))}
                else:
                    data = json.loads(body)
                status, answer = 200, handler(data)
            except Exception as error:
                status, answer = 400, {"error": str(error)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def post(address, body, kind="application/json"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


def test_a_picture_is_answered_in_every_form_that_it_may_have(endpoint, handler, digits):
    wanted = digits.predict(SEVEN, top_k=5)[0]
    status, answer = post(endpoint, SEVEN.read_bytes(), "image/png")
    assert status == 200 and [row["label"] for row in answer] == list(wanted.classes)
    assert answer[0]["score"] == pytest.approx(wanted.score) and answer[0]["expert"] == wanted.expert
    for form in (encoded(SEVEN), f"data:image/png;base64,{encoded(SEVEN)}"):
        assert post(endpoint, {"inputs": form}) == (200, answer)
    assert handler({"inputs": SEVEN.read_bytes()}) == answer


def test_many_pictures_and_parameters(endpoint, digits):
    pictures = EXAMPLES[:3]
    request = {"inputs": [encoded(path) for path in pictures], "parameters": {"top_k": 1, "reject_rate": 1}}
    status, answers = post(endpoint, request)
    assert status == 200 and len(answers) == 3
    for (row,), found in zip(answers, digits.predict(pictures, reject_rate=1), strict=True):
        assert (row["label"], row["typicality"]) == (found.label, found.typicality)
    assert any(row["label"] is None for (row,) in answers)


BAD = {
    "no inputs": ({}, "'inputs'"),
    "no request": ([1], "'inputs'"),
    "a path": ({"inputs": "/etc/passwd"}, r"inputs\[0\] is a text"),
    "an address": ({"inputs": "http://127.0.0.1/x.png"}, "is a text"),
    "no image": ({"inputs": base64.b64encode(b"GIF89a nothing").decode()}, r"inputs\[0\]"),
    "nothing": ({"inputs": ""}, "empty"),
    "a number": ({"inputs": [7]}, "of type int"),
    "too many": ({"inputs": ["x"] * 65}, "1 to 64 images"),
    "none": ({"inputs": []}, "1 to 64 images"),
    "an unknown parameter": ({"inputs": encoded(SEVEN), "parameters": {"expert": "x"}}, "reject_rate and top_k"),
    "parameters that are none": ({"inputs": encoded(SEVEN), "parameters": [1]}, "'parameters' is a dictionary"),
    "a wrong number": ({"inputs": encoded(SEVEN), "parameters": {"top_k": 0}}, "top_k=0"),
    "a wrong rate": ({"inputs": encoded(SEVEN), "parameters": {"reject_rate": "1"}}, "reject_rate='1'"),
}


@pytest.mark.parametrize("request_, message", BAD.values(), ids=BAD)
def test_what_is_wrong_is_told(endpoint, handler, request_, message):
    status, answer = post(endpoint, request_)
    assert status == 400
    with pytest.raises(ValueError, match=message):
        handler(request_)
    assert "Traceback" not in answer["error"]


def test_a_bomb_is_refused(endpoint, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    large = io.BytesIO()
    PIL.Image.new("L", (100, 100)).save(large, "png")
    status, answer = post(endpoint, {"inputs": base64.b64encode(large.getvalue()).decode()})
    assert status == 400 and "inputs[0]" in answer["error"]


def test_a_push_adds_it_and_a_later_one_leaves_it(hub, tmp_path):
    target, folder = PushTarget("alice/model", token="hf_alice"), tmp_path / "there"
    push_folder(bundled_folder(DIGITS_MODEL), target, handler=True)
    push_folder(bundled_folder(DIGITS_MODEL), target)
    assert len(ContinualModel.from_pretrained("alice/model", token="hf_alice").config.tasks) == 5
    api = HfApi(token="hf_alice")
    for name in ("handler.py", "requirements.txt"):
        api.hf_hub_download("alice/model", name, local_dir=folder)
    assert (folder / "handler.py").read_bytes() == (ASSETS / "endpoint" / "handler.py").read_bytes()
    assert (folder / "requirements.txt").read_text().startswith("hf-clpeft>=")
