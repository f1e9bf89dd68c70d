"""What is installed: a wheel with all that it needs, and an sdist that makes the same wheel."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_clpeft
from hf_clpeft import ContinualModel, load_benchmark
from hf_clpeft.backbones.bundled import BUNDLED_BACKBONES, BUNDLED_MODELS, bundled_folder
from hf_clpeft.reports.versions import _version, library_versions
from hf_clpeft.streams.images import open_image


ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what, source, folder):
    """Builds as `pip` does, and gives the path of the file."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUILD, what, folder], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


def test_the_wheel_carries_everything_and_runs_without_the_repo(wheel, tmp_path):
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    for folder in (BUNDLED_BACKBONES | BUNDLED_MODELS).values():
        assert f"hf_clpeft/assets/{folder}/config.json" in files
    wanted = ["py.typed", "assets/model_card.md", "demo/page.css", "metrics/continual_learning/continual_learning.py"]
    assert {f"hf_clpeft/{name}" for name in wanted} <= files
    assert not [name for name in files if name.startswith(("tests", "recipes")) or "__pycache__" in name]
    command = [sys.executable, "-c", "from hf_clpeft.cli import main; main()", "test"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "hf-clpeft demo" in done.stdout


def test_the_sdist_makes_the_same_wheel(wheel, source, tmp_path):
    with tarfile.open(build("build_sdist", source, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    with zipfile.ZipFile(build("build_wheel", unpacked, tmp_path / "again")) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names == {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}


def test_the_version_stands_in_one_place():
    assert metadata("hf-clpeft")["Version"] == hf_clpeft.__version__


def test_a_source_tree_that_is_not_installed_knows_its_own_version(monkeypatch):
    def none_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("hf_clpeft.reports.versions.version", none_installed)
    monkeypatch.setattr("hf_clpeft.reports.versions._version", _version.__wrapped__)  # without its cache
    versions = library_versions()
    assert versions.pop("hf-clpeft") == hf_clpeft.__version__ and set(versions.values()) == {"unknown"}


def test_lower_bounds_are_what_the_core_tests_run_on():
    def read(lines, sign):
        pairs = (line.strip().partition(sign) for line in lines if sign in line)
        return {canonicalize_name(name): Version(version) for name, _, version in pairs}

    lowest = read((ROOT / "constraints-lowest.txt").read_text().splitlines(), "==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = read(project["dependencies"] + project["optional-dependencies"]["demo"], ">=")
    assert all(bounds[name] <= lowest[name] for name in bounds)
    for name in ("accelerate", "datasets", "gradio", "huggingface-hub", "peft", "transformers"):
        assert bounds[name].release[:2] == lowest[name].release[:2]


@pytest.fixture(scope="module")
def digits():
    """Test images of every task, and their labels."""
    return [
        list(zip(*((open_image(image), task.classes[label]) for image, label, _ in task.test), strict=True))
        for task in load_benchmark("digits")
    ]


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_a_bundled_model_does_what_its_card_says(name, digits):
    model = ContinualModel.from_pretrained(name)
    right = [np.mean([p.label for p in model.predict(images)] == np.array(labels)) for images, labels in digits]
    card = (bundled_folder(name) / "README.md").read_text(encoding="utf-8")
    assert f"| average accuracy | {100 * np.mean(right):.1f} % |" in card
    assert f'from_pretrained("{name}")' in card
    assert (ROOT / "model_cards" / f"{bundled_folder(name).name}.md").read_text(encoding="utf-8") == card
