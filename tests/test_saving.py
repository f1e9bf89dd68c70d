"""What is saved loads again, and takes the place of nothing but an earlier state of itself."""

import builtins
import copy
import io
import shutil
from pathlib import Path

import pytest
import torch
from conftest import drawing, make_trainer, pattern_dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    ExpertError,
    TaskStream,
    slda,
)
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.cli import app
from hf_clpeft.config import ContinualConfig
from hf_clpeft.export import export_adapter, export_merged
from hf_clpeft.storage.files import check_same_model
from hf_clpeft.storage.folder import atomic


pytestmark = pytest.mark.usefixtures("shallow")
CLASSES = [["cat", "dog"], ["owl", "emu"], ["fox", "elk"]]
EVERY = {
    "s_lora": {"k": 2},
    "s_prompts_pp": {"k": 2},
    "s_lora_mix": {"mix": 2},
    "l2l": {"pool_size": 3, "top_n": 2},
    "slda": {},
    "ranpac": {"projection_size": 40},
    "sequential_lora": {},
}


def teach(model, seed=0, tasks=range(2)):
    """Tasks that no image taught, but whose every number depends on the seed."""
    generator, method = torch.Generator().manual_seed(seed), model.method
    for i in tasks:
        model.start_task(f"task-{i:03d}", CLASSES[i])
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        features = torch.randn(8, method.query_size, generator=generator)
        labels = torch.tensor(method.numbers * 4)
        model.finish_task(lambda _: (features, labels), num_train_images=8)  # noqa: B023  # called at once
    return model


@pytest.fixture
def make(backbone):
    def make(method="s_lora", seed=0, tasks=range(2), **options):
        config = ContinualConfig(METHODS[method].Config(**(EVERY.get(method, {}) | options)), backbone.config)
        return teach(ContinualModel(copy.deepcopy(backbone), config), seed, tasks)

    return make


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", EVERY)
def test_another_run_does_not_replace_a_model_and_the_same_one_goes_on(make, method):
    model = make(method)
    model.save_pretrained("out")
    model.save_pretrained("out")
    teach(model, tasks=[2]).save_pretrained("out")  # it goes on
    loaded = ContinualModel.from_pretrained("out", backbone=make(method, tasks=()).backbone)
    loaded.save_pretrained("out")
    before = files_of("out")
    for other in (make(method, seed=1, tasks=range(3)), make(method, seed=1), make(method, tasks=())):
        with pytest.raises(ConfigError, match="out holds another model, which would be lost: .* overwrite=True"):
            other.save_pretrained("out")
    assert files_of("out") == before
    other = make(method, seed=1)
    other.save_pretrained("out", overwrite=True)
    found = ContinualModel.from_pretrained("out", backbone=loaded.backbone)
    assert [task.name for task in found.config.tasks] == ["task-000", "task-001"]
    assert torch.equal(next(iter(found.state_dict().values())), next(iter(other.state_dict().values())))
    other.save_pretrained("out")


def test_an_earlier_state_does_not_replace_a_later_one(make):
    model = make(tasks=[0])
    model.save_pretrained("early")
    teach(model, tasks=[1]).save_pretrained("late")
    shutil.copytree("late", "out")
    with pytest.raises(ConfigError, match="out holds another model.*has learnt task-001, which this one has not"):
        ContinualModel.from_pretrained("early").save_pretrained("out")
    fork = teach(ContinualModel.from_pretrained("early"), seed=9, tasks=[1])
    with pytest.raises(ConfigError, match="has learnt task-001 in another run"):
        fork.save_pretrained("out")


def test_a_model_that_has_unlearnt_replaces_itself(make):
    model = make()
    model.save_pretrained("out")
    model.remove("task-000")
    model.save_pretrained("out")
    teach(model, tasks=[2]).save_pretrained("out")
    assert [path.name for path in sorted(Path("out/experts").iterdir())] == ["task-001", "task-002"]


def test_a_model_that_has_unlearnt_all_of_its_tasks_is_saved_and_learns_again():
    stream = TaskStream.class_incremental(pattern_dataset(4, per_class=6), num_tasks=2)
    make_trainer(slda(), "out").learn(stream[0])
    with drawing():
        done = CliRunner().invoke(app, ["remove", "out", "task-000", "--yes"])
        assert done.exit_code == 0, done.output
        assert CliRunner().invoke(app, ["info", "out"]).exit_code == 0
    assert "It has learnt nothing yet." in Path("out/README.md").read_text()
    model = ContinualModel.from_pretrained("out")
    assert model.config.tasks == [] and model.config.removed == ["task-000"]
    type(make_trainer(slda(), "other"))(model, make_trainer(slda(), "out").args).learn(stream[1])
    assert ContinualModel.from_pretrained("out").config.classes == ["class 2", "class 3"]


@pytest.mark.usefixtures("deep")
def test_a_model_from_before_it_was_known_goes_on(fresh_backbone):
    folder = shutil.copytree(bundled_folder("hf-clpeft/s-lora-digits"), "old")
    model = ContinualModel.from_pretrained(folder, backbone=fresh_backbone)
    model.save_pretrained(folder)
    model.remove("task-001")
    model.save_pretrained(folder)
    other = ContinualModel.from_pretrained("hf-clpeft/s-prompts-digits", backbone=fresh_backbone)
    with pytest.raises(ConfigError, match="old holds another model, .*: one of the method s_lora"):
        other.save_pretrained(folder)


def test_what_is_no_model_of_ours_is_not_replaced(make):
    model = make()
    export_merged(model, "task-000", "plain")
    before = files_of("plain")
    with pytest.raises(ConfigError, match="plain holds another model, .*: one that cannot be read"):
        model.save_pretrained("plain")
    with pytest.raises(ConfigError, match="plain holds model.safetensors"):  # with which it would not load
        model.save_pretrained("plain", overwrite=True)
    assert files_of("plain") == before
    Path("data").mkdir()
    Path("data", "features.npz").write_bytes(b"")
    with pytest.raises(ConfigError, match="data holds features.npz, which can run code"):
        model.save_pretrained("data")
    assert check_same_model("nowhere", model.config) is check_same_model("nowhere", None) is None
    model.save_pretrained("ours")
    with pytest.raises(ConfigError, match="ours holds another model, .*: one that has learnt task-000, task-001. Go"):
        check_same_model("ours", None, "Go away.")


def test_the_same_is_true_of_the_trainer(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)
    trainer = make_trainer(METHODS["s_lora"].Config(k=1), "out", num_train_epochs=1)
    trainer.learn(stream[0])
    other = make_trainer(METHODS["s_lora"].Config(k=1), "out", num_train_epochs=1, seed=7)
    before = files_of("out")
    with pytest.raises(ConfigError, match="out holds another model"):
        other.learn(stream[0])
    assert files_of("out") == before
    trainer.learn(stream[1])


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_replaces_no_other_model(make, merged):
    export, model = export_merged if merged else export_adapter, make()
    export(model, "task-000", "out")
    before = files_of("out")
    export(model, "task-000", "out")  # the same again
    with pytest.raises(ConfigError, match=r"out/.* belongs to another model, .*--overwrite"):
        export(model, "task-001", "out")
    assert files_of("out") == before
    export(model, "task-001", "out", overwrite=True)
    assert files_of("out") != before
    model.save_pretrained("model")
    before = files_of("model")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="model.* would spoil"):
            export(model, "task-001", "model", overwrite=overwrite)
    assert files_of("model") == before


def test_a_full_disk_in_the_middle_of_an_export_is_an_error_of_the_disk(make, monkeypatch):
    def full(*args, **options):
        with atomic("elsewhere"):
            from safetensors import SafetensorError

            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match="could not be saved and stays as it was: .*No space left on device") as refused:
        export_merged(make(), "task-000", "out")
    assert refused.value.errno == 28 and not list(Path("out").iterdir())


def test_combining_replaces_no_other_model(make):
    for name, seed in (("a", 0), ("b", 1)):
        make(seed=seed).save_pretrained(name)
    before = files_of("a")
    words = ["combine", "a", "b", "-o"]
    refused = CliRunner().invoke(app, [*words, "a"])
    assert isinstance(refused.exception, ConfigError) and files_of("a") == before
    assert CliRunner().invoke(app, [*words, "b", "--overwrite"]).exit_code == 0
    assert len(ContinualConfig.load("b").tasks) == 4


def finish_without_router(model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model.router, "learn", lambda *features, seed: None)
        model.finish_task(lambda features: (), num_train_images=4)


def test_a_model_that_is_not_whole_is_not_saved(make, monkeypatch):
    model = make("s_lora_mix")
    model.save_pretrained("out")
    before = files_of("out")
    model.start_task("task-002", CLASSES[2])
    finish_without_router(model, monkeypatch)
    with pytest.raises(ConfigError, match="The router has learnt 2 of 3 tasks, not task-002. The method's .end. must"):
        model.save_pretrained("out")
    model.router.learn(torch.randn(4, model.method.query_size), torch.tensor([4, 4, 4, 4]))  # and no image of class 5
    with pytest.raises(ConfigError, match="The router knows no image of 1 of the classes"):
        model.save_pretrained("out")
    assert files_of("out") == before
    model.router.classes[-1] = 5
    with pytest.raises(ConfigError, match="knows no image of 1 of the classes"):
        model.save_pretrained("out")


@pytest.mark.parametrize("what", ["router", "heads", "expert", "integers"])
def test_numbers_that_would_not_load_are_not_saved(make, what):
    model = make()
    model.save_pretrained("out")
    before = files_of("out")
    if what == "router":
        model.router.prototypes[0] = torch.nan
    elif what == "heads":
        model.heads.biases[1].data[0] = torch.inf
    else:
        model.unchanged.clear()
        rows = model.bank.table.rows
        rows.data[:] = torch.nan
    if what == "integers":
        model.heads.classes[0] = [0, 0]
    with pytest.raises(ConfigError, match="not whole and was not saved"):
        model.save_pretrained("out")
    assert files_of("out") == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["s_lora", "s_lora_mix", "l2l", "slda"])
def test_the_files_are_the_same_whatever_the_precision(make, method, dtype):
    model = make(method)
    model.to(dtype)
    model.save_pretrained("out")
    for name in ("router.safetensors", "heads.safetensors"):
        assert {tensor.dtype for tensor in load_file(f"out/{name}").values()} <= {torch.float32, torch.int64}
    assert len(ContinualModel.from_pretrained("out").config.tasks) == 2


@pytest.mark.parametrize("harm", ["deleted", "cut", "replaced"])
def test_an_expert_that_was_harmed_on_disk_is_written_again(make, harm):
    model = make()
    model.save_pretrained("out")
    path = Path("out/experts/task-000/adapter_model.safetensors")
    whole = path.read_bytes()
    if harm == "deleted":
        shutil.rmtree(path.parent)
    else:
        path.write_bytes(whole[:-1] if harm == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    teach(model, tasks=[2]).save_pretrained("out")
    assert path.read_bytes() == whole and len(ContinualModel.from_pretrained("out").config.tasks) == 3


@pytest.mark.usefixtures("deep")
def test_what_was_learnt_by_hand_is_saved_with_its_report(fresh_backbone, monkeypatch):
    model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits", backbone=fresh_backbone)
    model.start_task("by-hand", ["p", "q"])
    finish_without_router(model, monkeypatch)
    with pytest.raises(ConfigError, match="The router has learnt 5 of 6 tasks, not by-hand. The method's .end. must"):
        model.save_pretrained("out")
    model.router.learn(torch.randn(9, model.method.query_size))
    model.save_pretrained("out")
    assert ContinualModel.from_pretrained("out").report.tasks[-1] == "by-hand"


def test_integers_of_a_technique_are_no_expert(make):
    with pytest.raises((ConfigError, ExpertError)):
        model = make(lora={"peft_type": "SHIRA"})
        model.save_pretrained("out")


@pytest.mark.parametrize("method", ["s_lora", "s_lora_mix"])
def test_a_further_task_is_saved_without_reading_what_was_there(make, monkeypatch, method):
    model, opened = make(method), []
    model.save_pretrained("out")
    teach(model, tasks=[2])

    def watched(path, *args, **options):
        opened.append(str(path))
        return plain(path, *args, **options)

    plain = builtins.open
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", watched)
        patch.setattr(io, "open", watched)
        model.save_pretrained("out")
    assert not [path for path in opened if path.startswith("out/") and not path.startswith("out/.sav")]  # staged
    assert "out/.saving/config.json" in opened
    assert len(ContinualModel.from_pretrained("out", backbone=model.backbone).config.tasks) == 3


def test_a_configuration_that_was_edited_since_the_last_save_is_read_again(make):
    model = make()
    model.save_pretrained("out")
    config = Path("out/config.json")
    config.write_text(config.read_text().replace('"task-001"', '"task-777"'))
    with pytest.raises(ConfigError, match="has learnt task-777, which this one has not"):
        model.save_pretrained("out")
