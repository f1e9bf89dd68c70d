"""Models that were saved in version 1 of the format load, answer, learn on and are pushed; what is none is refused.

`version1/models.zip` was made by commit 684ff39, the last to write that version: each method learnt the first two
tasks of `load_benchmark("digits", max_train_samples_per_task=48, max_test_samples_per_task=16)` on the bundled
backbone, in one epoch of batches of 32; then card, tables and pictures were left out. `version1/expected.safetensors`
is what they said of `torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))`, on one thread of a CPU.
"""

import copy
import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_trainer
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from test_fuzz import DOCUMENTED, fuzzed, mutate_json
from typer.testing import CliRunner

from hf_clpeft import ConfigError, ContinualModel, ContinualTrainer, ContinualTrainingArguments, load_benchmark, s_lora
from hf_clpeft.cli import app
from hf_clpeft.config import ContinualConfig
from hf_clpeft.config.version1 import upgrade
from hf_clpeft.hub.push import PushTarget, push_folder
from hf_clpeft.training.options import BackboneArguments


FOLDER = Path(__file__).parent / "version1"
EXPECTED = load_file(FOLDER / "expected.safetensors")
NAMES = sorted({name.split(".")[0] for name in EXPECTED})
NOW = {  # what version 2 calls them, where that is another name
    "joint_lora": "sequential_lora",
    "s_dora": "s_lora",
    "s_ia3": "s_x",
    "s_lora_gaussian": "s_lora",
    "s_lora_two_layers": "s_lora",
    "mix_last_layer": "s_x_mix",
    "pool_of_mine": "l2x",
    "class_means_of_mine": "closed_form",
}
SMALL = {"max_train_samples_per_task": 48, "max_test_samples_per_task": 16}


@pytest.fixture
def old(tmp_path):
    """Gives the folder of a model."""

    def unpack(name):
        with zipfile.ZipFile(FOLDER / "models.zip") as archive:
            archive.extractall(tmp_path, [path for path in archive.namelist() if path.startswith(f"{name}/")])
        return tmp_path / name

    return unpack


def said(model):
    with torch.no_grad():
        output = model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return {"logits": output.logits, "selection": output.selection, "distances": output.distances}


def check_said(model, name):
    """But for rounding, which differs from processor to processor, AVX512 or not."""
    for what, found in said(model).items():
        torch.testing.assert_close(found, EXPECTED[f"{name}.{what}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_and_predicts_the_same(name, old, backbone):
    folder = old(name)
    model = ContinualModel.from_pretrained(folder, backbone=copy.deepcopy(backbone))
    assert model.config.method.name == NOW.get(name, name)
    check_said(model, name)
    shown = json.loads(CliRunner().invoke(app, ["info", str(folder), "--json"], catch_exceptions=False).stdout)
    assert shown["method"] == NOW.get(name, name) and len(shown["tasks"]) == 2 and shown["metrics"]
    before = tensors_in(folder)
    model.save_pretrained(folder)  # in its own place, and no tensor changes
    assert json.loads((folder / "config.json").read_text())["format_version"] == 3
    assert tensors_in(folder) == before
    again = ContinualModel.from_pretrained(folder, backbone=model.backbone)
    assert all(torch.equal(tensor, said(model)[what]) for what, tensor in said(again).items())
    assert again.config.tasks[-1].state == model.config.tasks[-1].state == state_of(name)


def tensors_in(folder):
    """Every tensor by file and name; version 1 wrote empty ones for a router that was not there."""
    tasks = [task["name"] for task in json.loads((folder / "config.json").read_text())["tasks"]]
    found = {}
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        if "counts" in tensors and path.name == "heads.safetensors":  # versions before 3 had those of each task
            counts = tensors.pop("counts").tolist()
            split = {key: zip(tasks, tensor.split(counts), strict=True) for key, tensor in tensors.items()}
            tensors = {f"{task}.{key}": rows for key, of_tasks in split.items() for task, rows in of_tasks}
        kept = {key: tensor.numpy().tobytes() for key, tensor in tensors.items() if tensor.numel()}
        found |= {(path.relative_to(folder), key): content for key, content in kept.items()}
    return found


def state_of(name):
    """What version 1 noted at the last task."""
    with zipfile.ZipFile(FOLDER / "models.zip") as archive:
        return json.loads(archive.read(f"{name}/config.json"))["tasks"][-1]["state"]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_on_and_is_pushed_where_version_1_was(name, old, hub):
    folder, repo_id = old(name), "alice/old"
    target = PushTarget(repo_id, token="hf_alice")
    push_folder(folder, target, "Learn task-001: 2, 3")  # as it is: the file of version 1
    assert json.loads(hub.repo(repo_id).files()["config.json"])["format_version"] == 1
    options = {"push_to_hub": True, "hub_model_id": repo_id, "hub_token": "hf_alice", "num_train_epochs": 1}
    args = ContinualTrainingArguments(str(folder), disable_tqdm=True, **options)
    trainer = ContinualTrainer(ContinualModel.from_pretrained(repo_id, token="hf_alice"), args)
    report = trainer.learn(load_benchmark("digits", **SMALL)[2])
    assert report.tasks == ["task-000", "task-001", "task-002"]
    assert len(report.accuracy_matrix) == 3 and report.accuracy_matrix[1][1] > 0
    repo = hub.repo(repo_id)
    assert [commit.title.split(":")[0] for commit in repo.commits()] == [
        "Learn task-002",
        "Learn task-001",
        "initial commit",
    ]
    assert sorted(repo.tags) == ["task-001", "task-002"]
    versions = {tag: json.loads(repo.files(tag)["config.json"])["format_version"] for tag in repo.tags}
    assert versions == {"task-001": 1, "task-002": 3}
    check_said(ContinualModel.from_pretrained(repo_id, revision="task-001", token="hf_alice"), name)
    pulled = ContinualModel.from_pretrained(repo_id, token="hf_alice")
    assert torch.equal(said(pulled)["logits"], said(trainer.model)["logits"]) and len(pulled.config.classes) == 6


def test_a_run_of_version_1_is_resumed(old):
    from hf_clpeft.training.recipe import learn

    folder = old("s_lora")
    options = {"num_train_epochs": 1, "train_batch_size": 32, "num_examples": 0}
    args = make_trainer(s_lora(), folder, resume_from_checkpoint="auto", **options).args
    stream = load_benchmark("digits", **SMALL)[:3]
    report = learn(stream, BackboneArguments(backbone="hf-clpeft/vit-tiny-glyphs"), args, s_lora(k=2))
    assert report.tasks == ["task-000", "task-001", "task-002"]
    whole = make_trainer(s_lora(k=2), "whole", **options)
    whole.learn_stream(stream)
    files = [ContinualConfig.load(place).files for place in (folder, "whole")]
    assert files[0].keys() == files[1].keys() and ContinualModel.from_pretrained(folder).report.measured() == [0, 1, 2]


def method(name="s_lora", **values):
    return lambda config: config["method"].update({"name": name, **values})


DAMAGED = {
    "unknown field": (method(depth=3), "method has no field 'depth'"),
    "of version 2": (method(query_layers=[1]), "method has no field 'query_layers'"),
    "no method": (lambda config: config.pop("method"), "lacks a field .*'method'"),
    "a list": (lambda config: config.update(method=["s_lora"]), "method is no mapping"),
    "text": (lambda config: config.update(method="s_lora"), "method is no mapping"),
    "no peft": (lambda config: config["method"].pop("peft"), "lacks a field .*'peft'"),
    "no name": (lambda config: config["method"].pop("name"), "lacks a field .*'name'"),
    "name": (method(name=5), "name=5 must be str"),
    "peft": (method(peft="LORA"), "peft='LORA' must be"),
    "no technique": (method(peft={}), "peft_type"),
    "unknown technique": (method(peft={"peft_type": "LOHAA"}), "Do you mean LOHA"),
    "rewrites the backbone": (method(peft={"peft_type": "LORA", "r": 1, "bias": "all"}), "bias="),
    "rank": (method(peft={"peft_type": "LORA", "r": 10**6}), "r=1000000 must be"),
    "experts": (method(experts="many"), "experts='many' must be one of per_task, pool"),
    "classifier": (method(classifier="mine"), "classifier='mine' must be one of head"),
    "head": (method(head="mine"), "head='mine' must be one of auto"),
    "readout": (method("l2p", experts="pool", readout="mine"), "readout='mine' must be one of cls"),
    "prompts of LoRA": (method("l2p", experts="pool", readout="prompts"), "readout='prompts' needs a pool of prompts"),
    "flag": (method(query_with_first_expert="yes"), "query_with_first_expert='yes' must be bool"),
    "number": (method(mix=True), "mix=True must be int"),
    "k": (method(k=0), "k=0 must be a whole number"),
    "k in words": (method(k="many"), "k='many' must be a whole number"),
    "layer": (method(route_layer="4"), "route_layer='4' must be"),
    "layer 0": (method(route_layer=0), r"query_layers=\[0\] must be layers from 1"),
    "layer 99": (method(route_layer=99), r"query_layers=\[99\], but the backbone has 6 layers"),
    "layers falling": (method(route_layer=[4, 2]), r"query_layers=\[4, 2\] must be"),
    "pool": (method("l2l", experts="pool", pool_size=0), "pool_size=0 must be between"),
    "top": (method("l2l", experts="pool", top_n=11), "top_n=11 must be between 1 and pool_size=10"),
    "pull": (method("l2l", experts="pool", pull=-1.0), "pull=-1.0 must be"),
    "projection": (method(projection_size=0), "projection_size=0 must be between"),
    "router": (method(router="unheard of"), "There is no router 'unheard of'"),
    "no likelihoods": (method(classifier="both", head="per_task"), "are none: choose"),
    "shared mix": (method(classifier="both", router="gaussian"), "head='shared' is not read any more"),
    "router alone": (method(classifier="router"), "experts='per_task', classifier='router', .* not go together"),
    "joint": (method(joint=True), "joint=True .* not go together"),
    "nothing": (method(experts="none", peft={}), "experts='none', classifier='head', joint=False .* not go together"),
    "experts of none": (method(experts="none", joint=True), "experts='none', .* not go together"),
    "another kind": (method("l2l", experts="pool"), "its tasks need the experts"),
    "true": (lambda config: config.update(format_version=True), "format_version True is not 3"),
    "version 0": (lambda config: config.update(format_version=0), "format_version 0 is not 3"),
    "called version 2": (lambda config: config.update(format_version=2), "method s_lora has no option"),
}


@pytest.mark.parametrize("change, message", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_refused(change, message, old, backbone):
    path = old("s_lora") / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        ContinualModel.from_pretrained(path.parent, backbone=backbone)


@fuzzed
@given(data=st.data())
def test_a_mutated_configuration_is_refused_or_whole(data, backbone):
    with zipfile.ZipFile(FOLDER / "models.zip") as archive:
        name = data.draw(st.sampled_from(["s_lora", "l2l", "ranpac", "mix_last_layer"]))
        archive.extractall(".", [path for path in archive.namelist() if path.startswith(f"{name}/")])
    mutate_json(Path(name, "config.json"), data)
    try:
        model = ContinualModel.from_pretrained(name, backbone=copy.deepcopy(backbone))
    except DOCUMENTED:
        return
    assert said(model)["logits"].shape == (8, len(model.config.classes))


@pytest.mark.parametrize(
    "peft, options",
    [
        ({"r": 4, "lora_alpha": 4}, {"r": 4, "lora": {}}),
        ({"r": 4}, {"r": 4, "lora": {"lora_alpha": 8}}),  # as PEFT has it
        ({}, {"r": 8, "lora": {"lora_alpha": 8}}),
        ({"r": 2, "lora_alpha": 3, "use_dora": True}, {"r": 2, "lora": {"lora_alpha": 3, "use_dora": True}}),
    ],
    ids=str,
)
def test_arguments_of_lora_are_said_as_options(peft, options):
    values = upgrade({"format_version": 1, "method": {"name": "s_lora", "peft": {"peft_type": "LORA", **peft}}})
    assert {name: values["method"][name] for name in options} == options and values["format_version"] == 2
    assert s_lora(**{name: value for name, value in values["method"].items() if name != "name"}).peft == {
        "peft_type": "LORA",
        "lora_alpha": 8,
        **({"r": 8} | peft),
    }
