"""Experts of several models in one model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BACKBONE, make_trainer, pattern_dataset

from hf_clpeft import ConfigError, ContinualModel, ContinualTrainer, TaskStream, combine, s_lora, s_prompts
from hf_clpeft.storage.folder import hash_file


pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two models of two tasks each, by different people."""
    root = tmp_path_factory.mktemp("halves")
    stream = TaskStream.class_incremental(pattern_dataset(8, 8), num_tasks=4)
    for name, tasks in (("low", stream[:2]), ("high", stream[2:])):
        trainer = make_trainer(s_lora(k=2), root / name)
        for i, task in enumerate(tasks):
            trainer.learn(replace(task, name=f"task-00{i}"))
    return root, stream


def pixels():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_experts_prototypes_and_rows_stay_bit_identical(halves):
    root, stream = halves
    low, high = (ContinualModel.from_pretrained(root / name) for name in ("low", "high"))
    both = combine([root / "low", root / "high"])
    assert both.bank.names == ["low-task-000", "low-task-001", "high-task-000", "high-task-001"]
    assert both.config.classes == [f"class {i}" for i in range(8)] and both.heads.shared
    assert [task.source for task in both.config.tasks] == ["low", "low", "high", "high"]
    assert torch.equal(both.router.prototypes, torch.cat([low.router.prototypes, high.router.prototypes]))
    with torch.no_grad():
        found, alone = both(pixels()), {0: low(pixels()), 1: high(pixels())}
    nearer = (alone[1].distances.amin(dim=1) < alone[0].distances.amin(dim=1)).long()
    assert torch.equal(both.router.thresholds, torch.cat([low.router.thresholds, high.router.thresholds]))
    for half, columns in ((0, slice(0, 4)), (1, slice(4, 8))):
        mine = nearer == half
        assert torch.equal(found.selection[mine], alone[half].selection[mine] + 2 * half)
        assert torch.equal(found.logits[mine][:, columns], alone[half].logits[mine])


def test_a_combined_model_is_a_model_like_any_other(halves):
    root, stream = halves
    both = combine([root / "high", ContinualModel.from_pretrained(root / "low")])
    assert both.bank.names[2] == "low-task-000"  # a model in memory is called by where it was loaded from
    both.save_pretrained("both")
    loaded = ContinualModel.from_pretrained("both")
    with torch.no_grad():
        assert torch.equal(loaded(pixels()).logits, both(pixels()).logits)
    new = TaskStream.class_incremental(pattern_dataset(10), num_tasks=5)[4]
    report = ContinualTrainer(loaded, make_trainer(s_lora(), "more", num_train_epochs=1).args).learn(new)
    assert len(loaded.config.tasks) == 5 and report.measured() == [4]
    assert len(ContinualModel.from_pretrained("more").report.tasks) == 5


def place(root, *folders):
    """Copies of the model at these places."""
    return [shutil.copytree(root / "low", Path(folder), dirs_exist_ok=True) for folder in folders]


@pytest.mark.parametrize(
    "folders, names",
    [
        (["a/out", "b/out"], ["a-out", "b-out"]),
        (["a/x/out", "b/x/out", "c"], ["a-x-out", "b-x-out", "c"]),
        (["a/out", "a/out", "b/out"], ["a-out-1", "a-out-2", "b-out"]),
        (["modèle", "Straße (new)"], ["modele", "Stra-e-new"]),
        (["模型", "型号", "___", "ok"], ["model-1", "model-2", "model-3", "ok"]),
        (["model-2", "模型"], ["model-2-1", "model-2-2"]),
        (["v1.2", "v1-2", "v1-2-1"], ["v1-2-2", "v1-2-3", "v1-2-1"]),
        (["Out", "out"], ["Out-1", "out-2"]),
        (["with space/$(x)`", "-rf"], ["x", "rf"]),
    ],
)
def test_names_say_which_folder_a_task_comes_from(halves, folders, names):
    if len({folder.casefold() for folder in folders}) < len({*folders}) and Path("OUT").exists():
        pytest.skip("this disk does not tell Out from out")
    both = combine(str(folder) for folder in place(halves[0], *folders))  # a generator
    assert [task.name for task in both.config.tasks] == [f"{name}-task-00{i}" for name in names for i in (0, 1)]
    assert not any(str(Path.cwd()) in task.source for task in both.config.tasks)
    assert [task.source.split("/")[-1] for task in both.config.tasks[::2]] == [f.split("/")[-1] for f in folders]


def test_long_names_stay_names_and_keep_both_ends(halves):
    folders = place(halves[0], "n" * 200, "n" * 199)
    names = [task.name for task in combine(folders).config.tasks]
    assert len(set(names)) == 4 and all(len(name) <= 96 and name.endswith("-task-00" + name[-1]) for name in names)
    again = combine([combine(folders), combine(folders)])
    assert len({task.name for task in again.config.tasks}) == 8


def test_the_folder_one_is_in_can_be_named(halves, monkeypatch):
    here, there = place(halves[0], "here", "there")
    monkeypatch.chdir(here)
    assert combine([".", "../there"]).bank.names[::2] == ["here-task-000", "there-task-000"]


def test_models_in_memory_are_named_by_their_origin_or_else_by_their_method(halves):
    a, b = (ContinualModel.from_pretrained(folder) for folder in place(halves[0], "a/out", "b/out"))
    assert combine([a, b]).bank.names[::2] == ["a-out-task-000", "b-out-task-000"]
    assert combine([a, a]).bank.names[::2] == ["out-1-task-000", "out-2-task-000"]
    a.origin = b.origin = None  # as if they had just been trained
    both = combine([a, b])
    assert both.bank.names[::2] == ["s-lora-1-task-000", "s-lora-2-task-000"]
    nested = combine([both, combine([a, "b/out"]), both])
    assert len({task.name for task in nested.config.tasks}) == 12
    nested.save_pretrained("nested")
    assert ContinualModel.from_pretrained("nested").config.classes == a.config.classes


def test_two_revisions_of_one_repo_are_told_apart(hub, halves):
    model = ContinualModel.from_pretrained(halves[0] / "low")
    model.push_to_hub("alice/low", token="hf_alice")
    both = combine(["alice/low@task-001", "alice/low@main"])
    assert both.bank.names[::2] == ["alice-low-task-001-task-000", "alice-low-main-task-000"]


def test_from_the_hub_at_a_revision(hub, halves):
    root, _ = halves
    for name in ("low", "high"):
        ContinualModel.from_pretrained(root / name).push_to_hub(f"alice/{name}", token="hf_alice")
    both = combine(["alice/low@task-001", "alice/high"])
    assert both.bank.names[0] == "alice-low-task-000" and both.bank.names[3] == "alice-high-task-001"
    assert [task.source for task in both.config.tasks][1:3] == ["alice/low@task-001", "alice/high"]


def test_one_class_known_to_both_is_one_class(halves, tmp_path):
    root, stream = halves
    trainer = make_trainer(s_lora(k=2), tmp_path / "again")
    trainer.learn(replace(stream[0], name="again"))
    both = combine([root / "low", tmp_path / "again"])
    assert both.bank.names == ["task-000", "task-001", "again"]  # nothing to tell apart
    assert both.config.classes == [f"class {i}" for i in range(4)]
    assert not both.heads.shared  # two rows for a class: each image is judged by those of its own expert
    logits = both(pixels()).logits
    assert logits.shape == (16, 4) and (logits.isfinite().sum(dim=1) == 2).all()


def test_the_same_weights_in_two_commits_go_together(halves, tmp_path):
    config = json.loads((halves[0] / "high" / "config.json").read_text())
    config["backbone"]["revision"] = "0" * 40
    other = shutil.copytree(halves[0] / "high", tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config))
    assert len(combine([halves[0] / "low", other]).config.tasks) == 4


def test_models_that_do_not_go_together_are_refused_with_what_differs(halves, tmp_path):
    root, stream = halves
    other = shutil.copytree(root / "high", tmp_path / "other")
    processor = json.loads((other / "preprocessor_config.json").read_text()) | {"resample": 2}
    (other / "preprocessor_config.json").write_text(json.dumps(processor))
    config = json.loads((other / "config.json").read_text())
    config["files"]["preprocessor_config.json"] = hash_file(other / "preprocessor_config.json")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="low and other .*: they were trained on pictures .*; resample differ"):
        combine([root / "low", other])
    model = ContinualModel.from_backbone(BACKBONE, s_lora(k=1), image_size=48)
    ContinualTrainer(model, make_trainer(s_lora(), "big", num_train_epochs=1).args).learn(stream[0])
    with pytest.raises(ConfigError, match="their image size differs, 32 and 48"):
        combine([root / "low", "big"])
    make_trainer(s_prompts(k=1), "prompts", num_train_epochs=1).learn(stream[0])
    with pytest.raises(
        ConfigError,
        match="they are models of s_lora and s_prompts, and their technique differs, 'LORA' and 'PROMPT_TUNING'",
    ):
        combine([root / "low", "prompts"])
    changed = ContinualModel.from_pretrained(root / "high")
    known, changed.config.backbone.weight_hash = changed.config.backbone.weight_hash, "0" * 64
    with pytest.raises(ConfigError, match=f"their backbone weights differs, {known[:12]}… and 000000000000…\\.$"):
        combine([root / "low", changed])


@pytest.mark.parametrize("learnt", ["l2l"], indirect=True)
def test_methods_whose_experts_do_not_stand_alone_are_refused(learnt):
    with pytest.raises(ConfigError, match="experts belong to no task|its own first expert"):
        combine([learnt.model, learnt.model])


def test_one_model_alone_is_refused(halves):
    with pytest.raises(ConfigError, match="two models or more; got 1"):
        combine([halves[0] / "low"])
    with pytest.raises(ConfigError, match="two models or more; got 1"):
        combine(str(halves[0] / "low"))
