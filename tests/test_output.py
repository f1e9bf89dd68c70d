"""A model is not overwritten by another one unless that is asked for."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from conftest import make_trainer, outcome, pattern_dataset

from hf_clpeft import ConfigError, ContinualModel, ContinualTrainer, TaskStream, l2l, ncm, s_lora, sequential_lora
from hf_clpeft.training.options import StreamArguments
from hf_clpeft.training.output import check_output
from hf_clpeft.training.recipe import run_recipe


pytestmark = pytest.mark.usefixtures("shallow")
METHODS = {
    "s_lora": s_lora(k=1),
    "l2l": l2l(pool_size=2, top_n=1),
    "ncm": ncm(),
    "sequential_lora": sequential_lora(),
}


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(num_classes=6, per_class=4), num_tasks=3)


@pytest.fixture(scope="module")
def finished(stream, tmp_path_factory):
    """Folders with a model of each method that has learnt two tasks."""
    folder = tmp_path_factory.mktemp("finished")
    for name, method in METHODS.items():
        make_trainer(method, folder / name, num_train_epochs=1).learn_stream(stream[:2])
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_new_model_never_takes_the_place_of_another_in_silence(name, finished, stream):
    folder = shutil.copytree(finished / name, "out")
    before = outcome(folder)
    with pytest.raises(ConfigError) as refused:
        make_trainer(METHODS[name], folder, num_train_epochs=1, seed=7).learn(stream[0])
    for word in (
        "out holds another model",
        "--resume_from_checkpoint",
        "--overwrite_output",
    ):
        assert word in str(refused.value)
    assert outcome(folder) == before
    trainer = make_trainer(METHODS[name], folder, num_train_epochs=1, seed=7, overwrite_output_dir=True)
    trainer.learn(stream[2])
    assert [task.classes for task in ContinualModel.from_pretrained(folder).config.tasks] == [["class 4", "class 5"]]
    trainer.learn(stream[0])  # its own


@pytest.mark.parametrize("name", METHODS)
def test_a_model_goes_on_where_it_is_and_nowhere_else(name, finished, stream):
    folder = shutil.copytree(finished / name, "out")
    model = ContinualModel.from_pretrained(folder)
    if name != "ncm":  # which has nothing that depends on a seed
        make_trainer(METHODS[name], "other", num_train_epochs=1, seed=7).learn_stream(stream[:2])
        with pytest.raises(ConfigError, match="other holds another model"):
            ContinualTrainer(model, make_trainer(METHODS[name], "other").args).learn(stream[2])
    args = make_trainer(METHODS[name], folder, num_train_epochs=1).args
    ContinualTrainer(model, args).learn(stream[2])
    assert len(ContinualModel.from_pretrained(folder).config.tasks) == 3
    old = ContinualModel.from_pretrained(finished / name)
    with pytest.raises(ConfigError, match="out holds another model"):
        ContinualTrainer(old, args).learn(stream[2])
    if name == "s_lora":
        model.remove("task-000")
        ContinualTrainer(model, args).learn(dataclasses.replace(stream[0], name="again"))


@pytest.mark.parametrize("name, content", [("config.json", '{"model_type": "vit"}'), ("README.md", "mine")])
def test_files_of_others_are_not_overwritten_either(name, content, stream):
    path = Path("out", name)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"out holds a?.*{name}.* would be overwritten.*--overwrite_output_dir"):
        make_trainer(s_lora(k=1)).learn(stream[0])
    assert path.read_text() == content
    with pytest.raises(ConfigError, match="README.md is a file|config.json is a file"):
        check_output(make_trainer(s_lora(k=1), path).args)


def test_a_recipe_refuses_before_anything_is_loaded_and_offers_commands_for_the_shell(finished, capsys, monkeypatch):
    shutil.copytree(finished / "s_lora", "my model")
    argv = ["--benchmark", "digits", "--output_dir", "my model", "--disable_tqdm", "--num_train_epochs", "1"]
    argv += ["--num_tasks", "2", "--max_train_samples_per_task", "16", "--max_test_samples_per_task", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(StreamArguments, "load", lambda self: pytest.fail("loaded"))
        with pytest.raises(SystemExit, match="^error: my model holds another model"):
            run_recipe("s_lora", argv=argv)
    run_recipe("s_lora", argv=[*argv, "--dry_run"])
    run_recipe("s_lora", argv=[*argv, "--overwrite_output_dir"])
    assert "hf-clpeft demo 'my model'    or    hf-clpeft push 'my model' ME/NAME" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: my model holds another model"):
        run_recipe("s_lora", argv=argv)
    run_recipe("s_lora", argv=[*argv, "--resume_from_checkpoint", "auto"])
