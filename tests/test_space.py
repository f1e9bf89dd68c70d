"""The Space: metadata that the Hub accepts, and an app that needs its own folder and the wheel, nothing else."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import gradio
from gradio_client import Client, handle_file
from huggingface_hub import SpaceCard

from hf_clpeft.backbones.bundled import BUNDLED_MODELS, DIGITS_MODEL, bundled_folder


ROOT = Path(__file__).parents[1]
SPACE = ROOT / "spaces" / "expert_router"


def test_the_front_matter_is_what_a_space_needs(hub):
    card = SpaceCard.load(SPACE / "README.md")
    card.validate(repo_type="space")
    assert (card.data.sdk, card.data.app_file, card.data.python_version) == ("gradio", "app.py", "3.11")
    assert card.data.sdk_version == gradio.__version__
    assert set(card.data.models) <= BUNDLED_MODELS.keys() and card.data.tags and card.data.title
    assert len(card.data.short_description) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card.data.colorFrom, card.data.colorTo} <= colours


def test_the_app_starts_from_its_folder_and_the_wheel(wheel, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for path in SPACE.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = ("ALLOW_TEACHING", "CL_REPO_ID", "CL_REVISION")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    environment |= {"PYTHONPATH": str(wheel), "GRADIO_SERVER_PORT": str(port)}
    here = {"cwd": tmp_path, "env": environment}
    where = [sys.executable, "-c", "import hf_clpeft; print(hf_clpeft.__file__)"]
    assert subprocess.check_output(where, text=True, **here).startswith(str(wheel))
    with subprocess.Popen([sys.executable, "app.py"], **here) as app:
        try:
            client = _client(f"http://127.0.0.1:{port}/", app)
            seven = bundled_folder(DIGITS_MODEL) / "examples" / "digit-7.png"
            assert client.predict(handle_file(str(seven)), "", api_name="/predict")[3]["label"] == "7"
            assert "/teach" not in client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        finally:
            app.terminate()


def _client(url, app):
    for _ in range(240):
        assert app.poll() is None, "the app has ended"
        try:
            return Client(url, verbose=False, ssl_verify=False)
        except Exception:
            time.sleep(0.25)
    raise AssertionError("the app has not started within a minute")
