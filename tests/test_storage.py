"""A model's folder: changed as a whole or not at all, and loaded as a whole or not at all."""

import errno
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, pattern_dataset, vouch
from safetensors.torch import load_file, save_file

from hf_clpeft import (
    ConfigError,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    ExpertError,
    TaskStream,
    s_lora,
)
from hf_clpeft.storage.folder import atomic, recover, remove_with


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}


def change(folder):
    with atomic(folder) as staging:
        (staging / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            (staging / name).write_text("new")
        remove_with(staging, ["old", "gone"])


def die_after(function, calls):
    """Lets this process end, as if killed, in the next call of a function of `os` after so many."""
    original, left = getattr(os, function), iter(range(calls))

    def call(*args, **options):
        return os._exit(9) if next(left, None) is None else original(*args, **options)

    setattr(os, function, call)


@pytest.mark.parametrize("function", ["rename", "replace", "fsync", "unlink", "rmdir"])
def test_a_folder_is_old_or_new_wherever_the_process_dies(function, tmp_path):
    old, new = {"a": "old", "sub/c": "old", "old": "old", "mine": "kept"}, None
    outcomes = set()
    for deaths in range(12):
        folder = tmp_path / str(deaths)
        (folder / "sub").mkdir(parents=True)
        for name, text in old.items():
            (folder / name).write_text(text)
        child = os.fork()
        if not child:
            die_after(function, deaths)
            change(folder)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        recover(folder)
        new = {"a": "new", "b": "new", "sub/c": "new", "mine": "kept"}
        found = {name: text for name, text in contents(folder).items() if not name.startswith(".saving")}
        assert found in (old, new), (function, deaths)
        outcomes.add(found == new)
        if not died:
            break
    assert True in outcomes  # undisturbed, it changes
    change(folder)
    assert contents(folder) == new  # and what a killed process left does no harm


def test_saving_again_changes_no_byte(saved, tmp_path):
    ContinualModel.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*"):
        if path.is_file() and path.name != "accuracy_and_routing.png":
            assert path.read_bytes() == (saved / path.relative_to(tmp_path / "again")).read_bytes(), path


def test_saving_writes_the_new_expert_and_not_the_old_ones(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)
    trainer = make_trainer(s_lora(k=1), tmp_path / "out", num_train_epochs=1)
    trainer.learn(stream[0])
    trainer.learn(stream[1])
    written = {path: path.stat().st_ino for path in (tmp_path / "out" / "experts").rglob("*.*")}
    assert len(written) == 4
    trainer.learn(stream[2])
    assert all(path.stat().st_ino == number for path, number in written.items())
    trainer.model.save_pretrained(tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere" / "experts").rglob("*.*"))) == 6


def test_the_folder_holds_json_and_safetensors_and_the_reports(saved):
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()} - {".lock"}
    experts = {
        f"experts/task-00{i}/{n}" for i in range(3) for n in ("adapter_config.json", "adapter_model.safetensors")
    }
    examples = {name for name in names if name.startswith("examples/")}
    assert len(examples) == 8 and names - examples == experts | {
        "README.md",
        "config.json",
        "preprocessor_config.json",
        "router.safetensors",
        "heads.safetensors",
        "metrics.json",
        "accuracy_matrix.csv",
        "accuracy_and_routing.png",
    }


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_leaves_the_model_as_it_was_and_says_so(saved, disk):
    folder = shutil.copytree(saved, disk / "model")
    model = ContinualModel.from_pretrained(folder)
    with pytest.raises(OSError), (disk / "filler").open("wb") as filler:
        filler.write(b"0" * 2**20)
    model.config.tasks[0].num_train_images = 1
    with pytest.raises(OSError, match="could not be saved and stays as it was: No space left on device"):
        model.save_pretrained(folder)
    assert ContinualModel.from_pretrained(folder).config.tasks[0].num_train_images == 96
    (disk / "filler").unlink()
    model.save_pretrained(folder)
    assert ContinualModel.from_pretrained(folder).config.tasks[0].num_train_images == 1


def test_a_read_only_folder_is_found_before_anything_is_learnt_and_can_be_read(saved, disk, learnt):
    folder = shutil.copytree(saved, disk / "model")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    model = ContinualModel.from_pretrained(folder)
    trainer = ContinualTrainer(model, ContinualTrainingArguments(str(folder), disable_tqdm=True))
    with pytest.raises(OSError, match="Read-only file system. Nothing was begun; choose another output_dir"):
        trainer.learn(learnt.stream[0])
    with pytest.raises(OSError, match="could not be saved and stays as it was: Read-only file system"):
        model.save_pretrained(folder)
    assert [task.name for task in model.config.tasks] == ["task-000", "task-001", "task-002"]


def edit_config(edit):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def edit_tensors(file, edit):
    def change(folder):
        tensors = load_file(folder / file)
        edit(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file)
        vouch(folder)

    return change


def first(tensors):
    return next(iter(tensors))


def spoil(tensors):
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = torch.nan


EXPERT = "experts/task-001/adapter_model.safetensors"
BROKEN = {
    "truncated expert": (
        lambda folder: (folder / EXPERT).write_bytes((folder / EXPERT).read_bytes()[:-9]) and vouch(folder),
        "task-001/adapter_model.safetensors is damaged",
    ),
    "flipped bit": (
        lambda folder: (folder / EXPERT).write_bytes((folder / EXPERT).read_bytes()[:-1] + b"\0"),
        "task-001/adapter_model.safetensors is not the file that config.json vouches for",
    ),
    "NaN in an expert": (edit_tensors(EXPERT, spoil), "not finite"),
    "NaN in the head": (edit_tensors("heads.safetensors", spoil), "heads.safetensors has values that are not finite"),
    "NaN in the router": (
        edit_tensors("router.safetensors", lambda tensors: tensors["prototypes"][0].fill_(torch.nan)),
        "router.safetensors has values that are not finite in prototypes",
    ),
    "expert of another shape": (
        edit_tensors(EXPERT, lambda tensors: tensors.update({first(tensors): tensors[first(tensors)][:, :-1]})),
        "'task-001' does not fit",
    ),
    "expert with a tensor too many": (
        edit_tensors(EXPERT, lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(1, 32)})),
        "'task-001' does not fit",
    ),
    "expert of another technique": (
        lambda folder: edit_json(folder / "experts/task-001/adapter_config.json", peft_type="SORCERY"),
        "adapter_config.json cannot be used",
    ),
    "head of another width": (
        edit_tensors("heads.safetensors", lambda t: t.update(weight=t["weight"][:, :-1].clone())),
        "head of task 'task-000' does not fit",
    ),
    "head of an unknown task": (
        edit_tensors("heads.safetensors", lambda t: t.update(counts=torch.cat([t["counts"], torch.zeros(1).long()]))),
        "it has 6 rows, which are not those of 3 tasks",
    ),
    "head with a row too many": (
        edit_tensors("heads.safetensors", lambda t: t.update(bias=torch.cat([t["bias"], torch.ones(1)]))),
        "different numbers of rows",
    ),
    "head of fewer than no rows": (
        edit_tensors("heads.safetensors", lambda t: t["counts"].copy_(torch.tensor([-2, 4, 4]))),
        "it has 6 rows, which are not those of 3 tasks",
    ),
    "head of an unknown class": (
        edit_tensors("heads.safetensors", lambda t: t["classes"][3:4].fill_(6)),
        "head of task 'task-001' does not fit: classes \\[2, 6\\] are not among the 6",
    ),
    "head of two versions": (
        edit_tensors("heads.safetensors", lambda t: t.update({"task-001.weight": torch.ones(2, 32)})),
        "it lacks \\['task-000.bias'.* and has \\['bias'",
    ),
    "router without a task": (
        edit_tensors(
            "router.safetensors",
            lambda t: t.update({key: t[key][t["owners"] != 1] for key in ("prototypes", "owners")}),
        ),
        "for tasks \\[0, 2\\]",
    ),
    "missing expert": (
        lambda folder: shutil.rmtree(folder / "experts" / "task-001"),
        "lacks the file experts/task-001",
    ),
    "missing router": (lambda folder: (folder / "router.safetensors").unlink(), "lacks the file router.safetensors"),
    "unknown expert": (
        lambda folder: shutil.copytree(folder / "experts" / "task-001", folder / "experts" / "task-777"),
        "experts/task-777/adapter_config.json, which its config.json does not know",
    ),
    "unknown weights": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
        "model.safetensors, which its config.json does not know",
    ),
    "pickle": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(pickle.dumps("boo")),
        "pytorch_model.bin, which can run code",
    ),
    "path out of the folder": (
        edit_config(lambda config: config["files"].update({"../../etc/passwd": "0" * 64})),
        "Path '../../etc/passwd' must be relative",
    ),
    "absolute path": (
        edit_config(lambda config: config["files"].update({"/etc/passwd": "0" * 64})),
        "Path '/etc/passwd' must be relative",
    ),
    "task named like a path": (
        edit_config(lambda config: config["tasks"][0].update(name="../../etc")),
        "must be 1 to 96 letters",
    ),
    "file that nobody vouches for": (
        edit_config(lambda config: config["files"].pop("heads.safetensors")),
        "lacks \\['heads.safetensors'\\]",
    ),
    "10 MB of configuration": (
        edit_config(lambda config: config["versions"].update(padding="x" * 10_000_000)),
        "config.json has 10,00.,... bytes; at most 8,388,608",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "JSON list": (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a mapping"),
    "newer format": (edit_config(lambda config: config.update(format_version=99)), "format_version 99"),
    "unknown field": (edit_config(lambda config: config.update(surprise=1)), "unknown"),
    "k = 0": (edit_config(lambda config: config["method"].update(k=0)), "k=0"),
    "lost field": (edit_config(lambda config: config.pop("method")), "lacks a field"),
    "classes of no task": (edit_config(lambda config: config.update(classes=["cat"])), "classes are not those of"),
    "two tasks of one name": (
        edit_config(lambda config: config["tasks"][1].update(name="task-000")),
        "Two tasks have the same name",
    ),
    "report of another model": (
        lambda folder: edit_json(folder / "metrics.json", tasks=["a", "b", "c"]),
        "metrics.json cannot be used: it is about the tasks",
    ),
}


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    vouch(path.parents[2] if path.parent.name.startswith("task-") else path.parent)


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
@pytest.mark.parametrize("label", ["", " ", "\t", "\u3000"])
def test_a_class_without_a_name_is_neither_learnt_nor_read(saved, label):
    with pytest.raises(ConfigError, match="Class 1 of task 'blank' is .*; a class needs a name"):
        ContinualModel.from_pretrained(saved).start_task("blank", ["cat", label])
    config = json.loads((saved / "config.json").read_text())
    known = config["tasks"][-1]["classes"].pop()
    config["tasks"][-1]["classes"].append(label)
    edit_json(saved / "config.json", tasks=config["tasks"], classes=[*config["classes"][:-1], label])
    with pytest.raises(ConfigError, match="config.json cannot be used: Class 1 of task 'task-002' is"):
        ContinualModel.from_pretrained(saved)
    assert known == config["classes"][-1]


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused(saved, what):
    breaking, message = BROKEN[what]
    breaking(saved)
    with pytest.raises((ConfigError, ExpertError), match=message):
        ContinualModel.from_pretrained(saved)


def test_a_folder_without_a_model_is_refused(tmp_path):
    Path(tmp_path, "config.json").mkdir()
    for folder in (tmp_path, tmp_path / "config.json"):
        for kind in (FileNotFoundError, ConfigError):
            with pytest.raises(kind, match=r"holds no config.json, so it is no hf_clpeft model\.$"):
                ContinualModel.from_pretrained(folder)


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_an_expert_from_before_the_renaming_of_vit_is_renamed(saved):
    expected = ContinualModel.from_pretrained(saved).bank[1].tensors
    folder = saved / "experts" / "task-001"
    old = {
        key.replace("layers.", "encoder.layer.")
        .replace("attention.", "attention.attention.")
        .replace("q_proj", "query")
        .replace("v_proj", "value"): tensor
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    assert "base_model.model.encoder.layer.0.attention.attention.query.lora_A.weight" in old
    save_file(old, folder / "adapter_model.safetensors")
    edit_json(folder / "adapter_config.json", target_modules=["query", "value"])
    found = ContinualModel.from_pretrained(saved).bank[1].tensors
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_too_little_space_is_seen_before_anything_is_written(learnt, tmp_path, monkeypatch):
    from shutil import disk_usage

    usage = disk_usage(tmp_path)
    monkeypatch.setattr("hf_clpeft.storage.folder.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="No space left on device: [0-9,]+ bytes needed, 1,000 free") as refused:
        learnt.model.save_pretrained(tmp_path / "model")
    assert refused.value.errno == errno.ENOSPC and not list((tmp_path / "model").iterdir())
