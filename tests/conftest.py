"""Small streams and models that many tests share. No test needs the network: the Hub is a server of our own."""

import atexit
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import hub_server
from temporary import write_to_memory


write_to_memory()
_until_exit = ExitStack()
atexit.register(_until_exit.close)
HUB = _until_exit.enter_context(hub_server.serve())
os.environ.update(  # read when huggingface_hub and datasets are imported
    HF_ENDPOINT=HUB.url,
    HF_HUB_DISABLE_XET="1",  # the server speaks LFS
    HF_HUB_OFFLINE="0",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    HF_HOME=_until_exit.enter_context(tempfile.TemporaryDirectory()),  # nobody's cache, nobody's token
)
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(name, None)
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, disable_progress_bars
from kept import keep_backbone, keep_findings, keep_images
from PIL import Image as PILImage

from hf_clpeft import TrainerCallback
from hf_clpeft.backbones.bundled import ASSETS, BUNDLED_BACKBONES, DIGITS_MODEL, bundled_folder
from hf_clpeft.reports import report
from hf_clpeft.reports.plots import plot_report


BACKBONE = "hf-clpeft/vit-tiny-glyphs"
EXAMPLES = sorted((bundled_folder(DIGITS_MODEL) / "examples").glob("*.png"))
SEVEN = EXAMPLES[7]
SLOW = """
    browser recipes processes onnx every_method torch_export compare readme version1 trunk docstrings
    backbone_families foreign_device checkpoints kill push speed lora_sums precision bank package streamed cli
    threads docs notebook space model prefix training fuzz slca_ssiat prompt_methods hub_answers sums adapters
    tutorials tuna mos callbacks together strangers demo_methods combine parallel tried saving demo_teaching
    own_routers learn controls console resume download card ease confidence output aper demo_pictures demo
""".split()  # files, the slowest first
_modules = 0  # that were imported when garbage was last looked for
disable_progress_bars()


def pytest_xdist_auto_num_workers():
    return os.cpu_count() + 1  # as some tests wait for a browser, a server or another process


def pytest_collection_modifyitems(items):
    """Slow files come first: at the end, one process would run the last of them while all others have nothing left."""
    rank = {f"test_{name}": number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """A test that leaves torch without its device contexts would spoil whatever model is loaded after it."""
    yield
    if "torch" in sys.modules:
        import torch

        with torch.device("meta"):
            assert torch.tensor([]).is_meta


@pytest.fixture(autouse=True)
def _no_garbage_in_modules():
    """Python looks for garbage now and then: not among half a million objects of imported modules."""
    global _modules
    if len(sys.modules) > _modules:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)
    yield


@pytest.fixture(scope="session", autouse=True)
def _garbage_in_the_end():
    yield
    gc.unfreeze()


@contextmanager
def drawing():
    """Reports are saved with their picture, as users have it: a quarter of the time that a tiny run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_report", plot_report)
        yield


@pytest.fixture(scope="module")
def drawn():
    """For tests that look at pictures of reports."""
    with drawing():
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_drawing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_report", lambda *args: Path(args[4]).touch())
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_search_for_garbage():
    """After every task, Accelerate looks at every object there is; Python itself looks often enough."""
    from accelerate.utils import memory

    clear = memory.clear_device_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "clear_device_cache", lambda garbage_collection=False: clear())
        yield


@pytest.fixture(scope="session", autouse=True)
def _made_once():
    with pytest.MonkeyPatch.context() as patch:
        keep_backbone(patch, bundled_folder(BACKBONE))
        keep_findings(patch)
        keep_images(patch)
        yield


@cache
def _shallow_folder(layers):
    """A checkpoint like the bundled one, but for the layers: the last few are all there are."""
    from safetensors.torch import load_file, save_file

    folder = Path(_until_exit.enter_context(tempfile.TemporaryDirectory()), "vit-tiny-glyphs")
    shutil.copytree(ASSETS / "vit-tiny-glyphs", folder)
    config = json.loads((folder / "config.json").read_text())
    left_out = config["num_hidden_layers"] - layers
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    kept = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        before, number, after = re.fullmatch(r"(?:(.*\.layer\.)(\d+))?(.*)", name).groups()
        if number is None:
            kept[name] = tensor
        elif int(number) >= left_out:
            kept[f"{before}{int(number) - left_out}{after}"] = tensor
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def shallowing(layers=2):
    """In this process, the bundled backbone has these few layers instead of six; `None`: all six again."""
    folder = "vit-tiny-glyphs" if layers is None else str(_shallow_folder(layers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUNDLED_BACKBONES, BACKBONE, folder)
        yield


@pytest.fixture(scope="module")
def shallow():
    """For modules to which any ViT will do: theirs has two layers."""
    with shallowing():
        yield


@pytest.fixture
def deep():
    """For tests of such modules to which it matters."""
    with shallowing(None):
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and none depends on the folder pytest was started in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub():
    """An empty Hub at `HF_ENDPOINT`."""
    HUB.reset()
    yield HUB
    HUB.reset()


def run(*words):
    """Runs a command in this process, as `main` does, and returns what it prints."""
    from typer.testing import CliRunner

    from hf_clpeft import cli

    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture
def fails(monkeypatch, capfd):
    """Runs a command that ends in one line; gives the line and the exit status."""

    from hf_clpeft import cli

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["hf-clpeft", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said, status = capfd.readouterr().err, ended.value.code
        if isinstance(status, str):  # which Python prints
            said, status = f"{said}{status}\n", 1
        assert "Traceback" not in said
        return said.strip().splitlines()[-1], status

    return command


@pytest.fixture
def me(hub, monkeypatch):
    """A Hub on which somebody called `me` is logged in."""
    from hf_clpeft.hub import push

    monkeypatch.setitem(hub.users, "hf_me", hub_server.User("me", ["me"]))
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setattr(push, "RETRY_DELAYS", (0, 0))
    return hub


def pictures(folder, classes, per_class=10):
    """A folder of pictures, as anybody has: a folder for each class."""
    rows = pattern_rows(num_classes=4, per_class=per_class)
    for number, (image, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
        if label in classes:
            path = Path(folder, f"bird {label}", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


@pytest.fixture
def other_precision():
    """Accelerate keeps one precision per process; lets a test use another."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def _backbones():
    from hf_clpeft import load_backbone

    return cache(lambda folder: load_backbone(BACKBONE))


@pytest.fixture(scope="module")
def backbone(_backbones):
    return _backbones(bundled_folder(BACKBONE))


@pytest.fixture
def fresh_backbone():
    """For tests that put adapters on it."""
    from hf_clpeft import load_backbone

    return load_backbone(BACKBONE)


def pattern_rows(num_classes=4, per_class=6, seed=0, domains=None):
    """Classes that are noisy copies of one random 4 x 4 pattern each: easy, tiny, and as many as a test wants."""
    patterns = np.random.default_rng(0).integers(0, 256, (num_classes, 4, 4, 3))
    rng = np.random.default_rng(seed)
    rows = {"image": [], "label": [], "domain": []}
    for domain in domains or ["plain"]:
        for label in range(num_classes):
            for _ in range(per_class):
                noisy = np.clip(patterns[label] + rng.normal(0, 12, (4, 4, 3)), 0, 255).astype(np.uint8)
                noisy = 255 - noisy if domain == "negative" else noisy
                rows["image"].append(PILImage.fromarray(noisy).resize((32, 32), PILImage.Resampling.NEAREST))
                rows["label"].append(label)
                rows["domain"].append(domain)
    return rows


def pattern_dataset(num_classes=4, per_class=6, domains=None):
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=[f"class {i}" for i in range(num_classes)]),
            "domain": Value("string"),
        }
    )
    sides = {"train": (per_class, 1), "test": (max(1, per_class // 2), 2)}
    return DatasetDict(
        {
            side: Dataset.from_dict(pattern_rows(num_classes, count, seed, domains), features=features)
            for side, (count, seed) in sides.items()
        }
    )


@pytest.fixture(scope="session")
def patterns():
    return pattern_dataset()


class OnStep(TrainerCallback):
    """Calls a function after every optimizer step, with its number and how many there will be."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, model, step, num_steps):
        self.function(step, num_steps)


def make_trainer(method, folder="out", callbacks=(), **options):
    from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments

    defaults = {"num_train_epochs": 2, "train_batch_size": 8, "eval_batch_size": 16, "disable_tqdm": True}
    args = ContinualTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return ContinualTrainer(ContinualModel.from_backbone(BACKBONE, method), args, callbacks)


def outcome(folder):
    """What a run ends with: every file by its hash, and all that was measured but the clock."""
    config, metrics = (json.loads(Path(folder, name).read_text()) for name in ("config.json", "metrics.json"))
    clock = ("seconds", "train_images_per_second")
    return config["files"], {name: value for name, value in metrics.items() if name not in clock}


@pytest.fixture
def saved(learnt, tmp_path):
    """A copy of the learnt model's folder, to be broken."""
    return shutil.copytree(learnt.args.output_dir, tmp_path / "model")


def vouch(folder):
    """Lets `config.json` vouch for the files as they are now, as whoever forges a model would."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    config["files"] = {
        name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest()
        for name in config["files"]
        if Path(folder, name).is_file()
    }
    path.write_text(json.dumps(config))


@pytest.fixture(scope="session")
def _trainers(tmp_path_factory):
    from hf_clpeft import METHODS, load_benchmark

    @cache  # while another one takes its turn as `learnt`
    def learn(name, backbone):
        options = {"k": 10} if name.startswith("s_") else {}
        trainer = make_trainer(METHODS[name].Config(**options), tmp_path_factory.mktemp(name), train_batch_size=32)
        trainer.stream = load_benchmark("digits", max_train_samples_per_task=96, max_test_samples_per_task=24)[:3]
        with drawing():
            trainer.learn_stream(trainer.stream)
        return trainer

    return learn


@pytest.fixture(scope="module", params=["s_lora", "s_prompts"])
def learnt(request, _trainers):
    """A trainer that has learnt the first three digit tasks, one for each PEFT technique. Not to be changed."""
    return _trainers(request.param, bundled_folder(BACKBONE))


@pytest.fixture(scope="session")
def page():
    """The demo of the bundled digits, served on this machine; also checks that nobody else was asked for anything."""
    import socket

    from hf_clpeft.demo import build_demo, launch_options

    outside, connect = [], socket.socket.connect

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
        return connect(self, address)

    socket.socket.connect = watched
    demo = build_demo(DIGITS_MODEL, teaching=True)
    demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield demo.local_url
    demo.close()
    socket.socket.connect = connect
    assert not outside


@pytest.fixture(scope="session")
def ask(page):
    """Calls an endpoint of the demo; paths become uploads."""
    from gradio_client import Client, handle_file

    # Without TLS to speak, its client need not load certificates for every request.
    client = Client(page, verbose=False, ssl_verify=False)

    def call(endpoint, *arguments):
        def upload(value):
            if isinstance(value, Path):
                return handle_file(str(value))
            return [upload(item) for item in value] if isinstance(value, list) else value

        return client.predict(*map(upload, arguments), api_name=endpoint)

    call.client = client
    return call


@pytest.fixture(scope="session")
def digits():
    from hf_clpeft import ContinualModel

    with shallowing(None):
        return ContinualModel.from_pretrained(DIGITS_MODEL)


@pytest.fixture(scope="session")
def handlers():
    from hf_clpeft.demo.handlers import Handlers
    from hf_clpeft.demo.models import Models

    return Handlers(Models(DIGITS_MODEL))


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """Paths of eight scans of the letter A, each in another face, and of one X."""
    import matplotlib
    from PIL import ImageDraw, ImageFont

    from hf_clpeft.demo.drawing import scan

    faces = "Sans Sans-Bold SansMono Sans-Oblique Serif SansMono-Bold Serif-Bold SansMono-Oblique".split()
    folder, paths = tmp_path_factory.mktemp("letters"), []
    for letter, face in [*(("A", face) for face in faces), ("X", "Sans")]:
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVu{face}.ttf", 200)
        drawing = PILImage.new("RGB", (280, 280), "white")
        ImageDraw.Draw(drawing).text((140, 140), letter, fill="black", font=font, anchor="mm")
        paths.append(folder / f"{letter}-{face}.png")
        scan(drawing).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the repo: building writes into it."""
    unneeded = shutil.ignore_patterns(".*", "out", "build", "*.egg-info")
    return shutil.copytree(Path(__file__).parents[1], tmp_path_factory.mktemp("repo") / "source", ignore=unneeded)


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    """The built wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"
