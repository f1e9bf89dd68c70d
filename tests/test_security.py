"""What is read can run no code, and what is secret is written nowhere."""

import ast
import logging
from pathlib import Path

import pytest
from conftest import make_trainer, pattern_dataset

import hf_clpeft
from hf_clpeft import TaskStream, s_lora


PACKAGE = Path(hf_clpeft.__file__).parent
RECIPES = Path(__file__).parents[1] / "recipes"
FORBIDDEN = {"eval", "exec", "compile", "__import__"}  # as plain calls: model.compile() is something else
MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("np", "load"), ("yaml", "load"), ("os", "system")}


@pytest.mark.parametrize(
    "path",
    sorted([*PACKAGE.rglob("*.py"), *RECIPES.glob("*.py")]),
    ids=lambda path: path.relative_to(PACKAGE.parent).as_posix(),
)
def test_nothing_that_is_read_can_run_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            assert not (isinstance(function, ast.Name) and function.id in FORBIDDEN), ast.unparse(node)
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                assert (function.value.id, function.attr) not in ATTRIBUTES, ast.unparse(node)
            for keyword in node.keywords:
                assert keyword.arg != "shell", ast.unparse(node)
                assert keyword.arg != "trust_remote_code" or ast.unparse(keyword.value) == "False", ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert not MODULES & {alias.name.split(".")[0] for alias in node.names}, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES, ast.unparse(node)


def test_a_token_gets_into_no_file_log_or_error(hub, tmp_path, caplog, capfd):
    token = "hf_alice"
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    options = {"push_to_hub": True, "hub_model_id": "alice/secret", "hub_token": token, "report_to": "tensorboard"}
    with caplog.at_level(logging.DEBUG):
        trainer = make_trainer(s_lora(k=1), tmp_path / "out", **options)
        trainer.learn_stream(stream)
        with pytest.raises(Exception) as refused:
            make_trainer(s_lora(k=1), tmp_path / "other", **{**options, "hub_model_id": "bob/not-mine"}).learn(
                stream[0]
            )
    shown = capfd.readouterr()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hf_clpeft")]
    for text in (
        shown.out,
        shown.err,
        *ours,
        str(refused.value),
        repr(trainer.args),
        repr(trainer._pusher.outbox.target),
    ):
        assert token not in text
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert token.encode() not in path.read_bytes(), path
    for name, content in hub.repo("alice/secret").files().items():
        assert token.encode() not in content, name
