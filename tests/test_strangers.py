"""A folder from a stranger: reading it changes nothing, and writing into it touches nothing outside of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import vouch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    ExpertError,
    HubError,
)
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.cli import app
from hf_clpeft.config.checks import read_json
from hf_clpeft.hub.outbox import Outbox
from hf_clpeft.hub.push import PushTarget, push_folder
from hf_clpeft.storage.files import as_saved
from hf_clpeft.storage.folder import atomic, recover, unfinished_change
from hf_clpeft.training.checkpoints import Checkpoints
from hf_clpeft.training.recipe import _find_checkpoint


@pytest.fixture
def model(backbone):
    """A model that may be changed."""
    return ContinualModel.from_pretrained("hf-clpeft/s-lora-digits", backbone=backbone)


@pytest.fixture
def folder(tmp_path):
    """A copy of its folder."""
    return shutil.copytree(bundled_folder("hf-clpeft/s-lora-digits"), tmp_path / "clone")


@pytest.fixture
def home(tmp_path):
    """What the stranger is after."""
    home = tmp_path / "home"
    (home / "ssh" / "old").mkdir(parents=True)
    for name in ("thesis.tex", "ssh/id_rsa", "ssh/old/key"):
        (home / name).write_text(f"years of work on {name}")
    return home


def tree(*folders):
    """Everything below, as it is, links not followed."""
    seen = {}
    for path in sorted(path for folder in folders for path in [folder, *folder.rglob("*")]):
        link = os.readlink(path) if path.is_symlink() else None
        content = path.read_bytes() if path.is_file() and link is None else None
        seen[path] = (path.lstat().st_mode, link, content, path.lstat().st_ino)
    return seen


def change_with(folder, removed=(), **files):
    """What a stranger would have a reader or writer end."""
    for name, text in files.items():
        path = folder / ".saved" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / ".saved").mkdir(exist_ok=True)
    (folder / ".saved" / ".removed.json").write_text(json.dumps({"removed": list(removed)}))


ATTACKS = {
    "absolute path": lambda folder, home: change_with(folder, [str(home)]),
    "path out of the folder": lambda folder, home: change_with(folder, ["../home/thesis.tex"]),
    "path out of the folder on a way round": lambda folder, home: change_with(folder, ["experts/../../home"]),
    "the folder itself": lambda folder, home: change_with(folder, ["."]),
    "an empty path": lambda folder, home: change_with(folder, [""]),
    "a hidden file": lambda folder, home: change_with(folder, [".git/config"]),
    "a path of another system": lambda folder, home: change_with(folder, ["..\\home", "C:\\home"]),
    "no text": lambda folder, home: change_with(folder, [3]),
    "a list as it once was": lambda folder, home: (
        change_with(folder),
        (folder / ".saved" / ".removed.json").write_text(json.dumps([str(home)])),
    ),
    "behind a link": lambda folder, home: (
        (folder / "experts2").symlink_to(home / "ssh"),
        change_with(folder, ["experts2/id_rsa"]),
    ),
    "a folder behind a link": lambda folder, home: (
        (folder / "experts2").symlink_to(home),
        change_with(folder, ["experts2/ssh/old"]),
    ),
    "written behind a link": lambda folder, home: (
        (folder / "experts2").symlink_to(home / "ssh"),
        change_with(folder, experts2__authorized_keys="mine"),
    ),
    "written behind a link further down": lambda folder, home: (
        (folder / "experts" / "x").symlink_to(home),
        change_with(folder, experts__x__ssh__authorized_keys="mine"),
    ),
    "a link in the change": lambda folder, home: (
        change_with(folder),
        (folder / ".saved" / "notes").symlink_to(home),
    ),
    "a link to a file in the change": lambda folder, home: (
        change_with(folder),
        (folder / ".saved" / "config.json").symlink_to(home / "thesis.tex"),
    ),
    "a change that is a link": lambda folder, home: (folder / ".saved").symlink_to(home),
    "a change that is a file": lambda folder, home: (folder / ".saved").write_text("boo"),
    "a pipe that nobody fills": lambda folder, home: (change_with(folder), os.mkfifo(folder / ".saved" / "pipe")),
    "a file in the place of a folder": lambda folder, home: (
        (folder / "experts2").write_text("boo"),
        change_with(folder, experts2__key="mine"),
    ),
    "a folder in the place of a file": lambda folder, home: change_with(folder, experts="mine"),
    "a folder without end": lambda folder, home: os.makedirs(folder / ".saved" / "/".join("a" * 100)),
    "a name of control characters": lambda folder, home: change_with(folder, **{"\x1b[2J": "boo"}),
}
READERS = {
    "info": lambda folder, model: refusing(CliRunner().invoke(app, ["info", str(folder)]).exception),
    "load": lambda folder, model: ContinualModel.from_pretrained(folder, backbone=model.backbone),
    "push": lambda folder, model: refusing(CliRunner().invoke(app, ["push", str(folder), "me/x"]).exception),
    "resume": lambda folder, model: _find_checkpoint(
        ContinualTrainingArguments(str(folder), resume_from_checkpoint="auto")
    ),
}
WRITERS = {
    "save": lambda folder, model: model.save_pretrained(folder),
    "recover": lambda folder, model: recover(folder),
    "change": lambda folder, model: atomic(folder).__enter__(),
}


def refusing(error):
    raise error


@pytest.mark.parametrize("what", ATTACKS)
def test_a_forged_change_reaches_nothing(folder, home, model, what):
    ATTACKS[what](folder, home)
    before = tree(folder, home)
    for access in (READERS | WRITERS).values():
        with pytest.raises(ConfigError, match=r"\.saved cannot be used and nothing was touched: .* delete it"):
            access(folder, model)
    assert tree(folder, home) == before


def test_folders_in_each_other_are_no_experts(folder, model):
    os.makedirs(folder / "experts" / "/".join("a" * 500))
    with pytest.raises(ConfigError, match="holds experts/a/a, which its config.json does not know"):
        ContinualModel.from_pretrained(folder, backbone=model.backbone)


def interrupt(monkeypatch, act):
    """Does it as a process would that is killed between the change and its end."""
    with monkeypatch.context() as patch:
        patch.setattr("hf_clpeft.storage.folder.recover", lambda folder: None)
        act()


def test_an_interrupted_save_is_read_whole_and_ended_by_the_next(folder, model, monkeypatch):
    model.remove("task-001")
    interrupt(monkeypatch, lambda: model.save_pretrained(folder))
    assert unfinished_change(folder)[0] == ["experts/task-001"]
    before, names = tree(folder), [task.name for task in model.config.tasks]
    loaded = ContinualModel.from_pretrained(folder, backbone=model.backbone)
    assert [task.name for task in loaded.config.tasks] == loaded.bank.names == names
    shown = json.loads(CliRunner().invoke(app, ["info", str(folder), "--json"]).stdout)
    assert [task["task"] for task in shown["tasks"]] == names and shown["unlearnt"] == ["task-001"]
    assert READERS["resume"](folder, model) == str(folder)
    assert tree(folder) == before
    view = as_saved(folder)
    copy = {path.relative_to(view): path.read_bytes() for path in view.rglob("*") if path.is_file()}
    loaded.save_pretrained(folder)
    assert unfinished_change(folder) is None and not (folder / "experts" / "task-001").exists()
    for path, content in copy.items():
        assert (folder / path).read_bytes() == content, path


def test_half_of_a_change_is_done_and_the_rest_is_found(folder, model, monkeypatch):
    model.remove("task-004")
    interrupt(monkeypatch, lambda: model.save_pretrained(folder))
    for name in ("config.json", "heads.safetensors"):
        os.replace(folder / ".saved" / name, folder / name)
    shutil.rmtree(folder / "experts" / "task-004")
    assert len(ContinualModel.from_pretrained(folder, backbone=model.backbone).config.tasks) == 4


def test_a_save_does_not_write_or_delete_behind_links(folder, home, model):
    target = home / "ssh" / "heads.safetensors"
    shutil.move(folder / "heads.safetensors", target)
    (folder / "heads.safetensors").symlink_to(target)
    (folder / ".saving").symlink_to(home)
    before = tree(home)
    loaded = ContinualModel.from_pretrained(folder, backbone=model.backbone)  # reading behind a link is no harm
    loaded.remove("task-000")
    loaded.save_pretrained(folder)
    assert tree(home) == before and not (folder / "heads.safetensors").is_symlink()
    assert not (folder / ".saving").is_symlink()
    shutil.move(folder / "experts", home / "experts")
    (folder / "experts").symlink_to(home / "experts")
    loaded.remove("task-002")
    before = tree(home, folder)
    with pytest.raises(ConfigError, match="experts is a symbolic link, and nothing is written or deleted behind one"):
        loaded.save_pretrained(folder)
    assert tree(home, folder) == before


def test_an_expert_behind_a_link_goes_without_what_the_link_leads_to(folder, home, model):
    shutil.move(folder / "experts" / "task-003", home / "experts")
    (folder / "experts" / "task-003").symlink_to(home / "experts")
    before = tree(home)
    model.remove("task-003")
    model.save_pretrained(folder)
    assert tree(home) == before and not (folder / "experts" / "task-003").exists()


@pytest.mark.parametrize("name", ["checkpoints", ".parallel", "outbox", ".lock"])
def test_a_run_does_not_work_behind_links(folder, home, model, name):
    (home / "backup-20240101").mkdir()  # looks like a checkpoint
    (folder / name).symlink_to(home / "thesis.tex" if name == ".lock" else home)
    before = tree(home)
    args = ContinualTrainingArguments(str(folder), save_total_limit=1, disable_tqdm=True)
    with pytest.raises(ConfigError, match=f"{name} is a symbolic link"):
        if name == "outbox":
            Outbox(folder, PushTarget("me/x"))
        else:
            ContinualTrainer(model, args).learn(None)
    if name == "checkpoints":
        with pytest.raises(ConfigError, match="symbolic link"):
            Checkpoints(folder, keep=1)
    assert tree(home) == before


def test_nothing_but_the_model_is_pushed(hub, folder, home):
    target = PushTarget("alice/x", token="hf_alice")
    for name in ("accuracy_matrix.csv", "accuracy_and_routing.png"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(home / "ssh" / "id_rsa")
    push_folder(folder, target)
    sent = hub.repo("alice/x").files()
    assert "heads.safetensors" in sent and not any(b"years of work" in content for content in sent.values())
    (folder / "heads.safetensors").unlink()
    (folder / "heads.safetensors").symlink_to(home / "ssh" / "id_rsa")
    with pytest.raises(ConfigError, match="heads.safetensors is not the file that config.json vouches for"):
        push_folder(folder, target)
    config = json.loads((folder / "config.json").read_text())
    config["files"]["notes"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, HubError), match="names \\['notes'\\], which no task needs"):
        push_folder(folder, target)


DTYPES = "float16 bfloat16 float64 float8_e4m3fn complex64 bool uint8 int8 int32 int64".split()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name, key",
    [
        ("heads.safetensors", "task-001.weight"),
        ("router.safetensors", "prototypes"),
        ("experts/task-001/adapter_model.safetensors", ""),
    ],
)
def test_tensors_of_another_dtype_are_refused(folder, model, name, key, dtype):
    tensors = load_file(folder / name)
    key = key or next(iter(tensors))
    tensors[key] = tensors[key].to(getattr(torch, dtype))
    save_file(tensors, folder / name)
    vouch(folder)
    if name.startswith("experts/") and dtype in ("float16", "bfloat16", "float64"):
        return  # adapters of others may be in half precision
    with pytest.raises((ConfigError, ExpertError), match=Path(name).name):
        ContinualModel.from_pretrained(folder, backbone=model.backbone)


@pytest.mark.parametrize("number", [-1, 5, 10**18, -(2**63)])
@pytest.mark.parametrize(
    "bundled, name, key",
    [
        ("s-lora", "heads.safetensors", "task-001.classes"),
        ("s-lora", "router.safetensors", "owners"),
        ("s-lora-mix", "router.safetensors", "classes"),
        ("s-lora-mix", "router.safetensors", "owners"),
    ],
)
def test_numbers_that_count_nothing_are_refused(tmp_path, backbone, bundled, name, key, number):
    folder = shutil.copytree(bundled_folder(f"hf-clpeft/{bundled}-digits"), tmp_path / "clone")
    tensors = load_file(folder / name)
    tensors[key][0] = number
    save_file(tensors, folder / name)
    vouch(folder)
    with pytest.raises(ConfigError, match=name):
        ContinualModel.from_pretrained(folder, backbone=backbone)


@pytest.mark.parametrize(
    "key, change",
    [
        ("scatter", lambda scatter: -scatter),
        ("counts", lambda counts: counts.fill_(10**18)),
        ("counts", lambda counts: -counts),
        ("owners", lambda owners: owners[0]),
    ],
)
def test_sums_of_no_images_are_refused(tmp_path, backbone, key, change):
    folder = shutil.copytree(bundled_folder("hf-clpeft/s-lora-mix-digits"), tmp_path / "clone")
    tensors = load_file(folder / "router.safetensors")
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, folder / "router.safetensors")
    vouch(folder)
    with pytest.raises(ConfigError, match="router.safetensors does not fit the model"):
        ContinualModel.from_pretrained(folder, backbone=backbone)


BAD_JSON = {
    '{"a": NaN}': "NaN is not a finite number",
    '{"a": [-Infinity]}': "-Infinity is not a finite number",
    '{"a": 1e999}': "1e999 is not a finite number",
    '{"a": 1, "b": 2, "a": 3}': "it has the field 'a' twice",
    '{"tasks": [{"classes": ["x", "\\ud800"]}]}': r"tasks\[0\]\['classes'\]\[1\] is '\\ud800', which is not valid",
    '{"\\udfff": 1}': "a field's name is .* which is not valid Unicode",
    '{"a": {"\\udfff": 1}}': "a name in a is .* which is not valid Unicode",
    '{"a": ' + "[" * 30 + "]" * 30 + "}": "is nested deeper than 20 levels",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "is not valid JSON",
    '{"a": ' + '{"a":' * 900 + "1" + "}" * 900 + "}": "is nested deeper than 20 levels",
    '{"a": 99999999999999999999}': "a is an integer of 67 bits",
    '{"a": ' + "9" * 5000 + "}": "is not valid JSON",
    "\ufeff{}": "is not valid JSON",
    "": "is not valid JSON",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: text[:24])
def test_json_that_means_nothing_is_refused(text):
    Path("config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json .*{BAD_JSON[text]}"):
        read_json("config.json")


@pytest.mark.parametrize("field", ["classes", "license", "domain"])
def test_half_a_character_is_refused_before_a_model_learns_it(model, field):
    if field == "license":
        model.config.license = "\udce4"
        with pytest.raises(ConfigError, match="license is .* not valid Unicode"):
            model.save_pretrained("out")
    else:
        with pytest.raises(ConfigError, match=f"{field}.* is .* not valid Unicode"):
            model.start_task("new", ["\udce4" if field == "classes" else "x", "y"], "\udce4")
