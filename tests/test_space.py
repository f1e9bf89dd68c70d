"""The Space: metadata that the Hub accepts, and an app that needs its own folder and the wheel, nothing else."""

import html
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import gradio
import pytest
from gradio_client import Client, handle_file
from huggingface_hub import HfApi, SpaceCard
from packaging.requirements import Requirement

from hf_clpeft.backbones.bundled import BUNDLED_MODELS, DIGITS_MODEL, bundled_folder
from hf_clpeft.demo.setup import build_or_explain


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
    settings = ("ALLOW_TEACHING", "CL_REPO_ID", "CL_REVISION", "CL_BACKBONE")
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


@pytest.fixture
def publish(source, monkeypatch):
    """The script beside the Space, of a copy of the repo."""
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say that there is none
    spec = importlib.util.spec_from_file_location("publish", source / "spaces" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_space_installs_the_wheel_that_lies_beside_it(publish, tmp_path):
    publish.prepare("me/router", tmp_path, published=False)
    (wheel,) = tmp_path.glob("*.whl")
    requirement = Requirement((tmp_path / "requirements.txt").read_text().strip())
    assert (requirement.name, requirement.extras) == ("hf-clpeft", {"demo"})
    assert requirement.url == f"{os.environ['HF_ENDPOINT']}/spaces/me/router/resolve/main/{wheel.name}"
    assert (tmp_path / "app.py").read_bytes() == (SPACE / "app.py").read_bytes()
    publish.prepare("me/router", tmp_path / "later", published=True)
    assert (tmp_path / "later" / "requirements.txt").read_bytes() == (SPACE / "requirements.txt").read_bytes()
    assert not list(tmp_path.glob("later/*.whl"))


def said(page):
    (part,) = page.get_config_file()["components"]
    return html.unescape(part["props"]["value"])


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_model_that_cannot_be_loaded_is_explained_to_its_owner(learnt, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    learnt.model.push_to_hub("alice/half")
    learnt.model.push_to_hub("alice/secret", private=True)
    HfApi().delete_file("experts/task-001/adapter_model.safetensors", "alice/half")
    text = said(build_or_explain("alice/half"))
    assert "alice/half lacks the file experts/task-001" in text and "pushed to the end" in text
    assert "hf_alice" not in text and "<bdi>set</bdi>" in text
    monkeypatch.delenv("HF_TOKEN")
    for name in ("alice/secret", "alice/none"):
        text = said(build_or_explain(name))
        assert "no such model repo, or it is private" in text and "HF_TOKEN" in text
    Path("photos").mkdir()
    text = said(build_or_explain("photos"))
    assert "photos holds no config.json, so it is no hf_clpeft model" in text and "CL_REPO_ID" in text
    (part,) = build_or_explain("<script>").get_config_file()["components"]
    assert "<script" not in part["props"]["value"]


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_backbone_in_a_folder_elsewhere_is_explained_and_can_be_set(learnt, tmp_path):
    folder = shutil.copytree(learnt.args.output_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    name, config["backbone"]["name_or_path"] = config["backbone"]["name_or_path"], "/home/me/vit"
    (folder / "config.json").write_text(json.dumps(config))
    text = said(build_or_explain(str(folder)))
    assert "/home/me/vit" in text and "CL_BACKBONE" in text
    assert build_or_explain(str(folder), backbone=name).title == "Which expert?"


def _client(url, app):
    for _ in range(720):
        assert app.poll() is None, "the app has ended"
        try:
            return Client(url, verbose=False, ssl_verify=False)
        except Exception:
            time.sleep(0.25)
    raise AssertionError("the app has not started within three minutes")
