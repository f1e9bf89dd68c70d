"""The command `hf-clpeft`, as a user types it."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Fault
from PIL import Image
from typer.testing import CliRunner

from hf_clpeft import ContinualModel, cli
from hf_clpeft.streams.images import open_image


REPO = "alice/model"
pytestmark = [
    pytest.mark.usefixtures("shallow"),
    pytest.mark.parametrize("learnt", ["s_lora"], indirect=True),
]


def run(*words, fails=False):
    """Runs a command in this process, as `main` does, and returns what it prints."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if fails:
        return result
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture
def pictures(learnt):
    encoded = [encoded for task in learnt.stream for encoded, _, _ in task.test][::9]
    for i, picture in enumerate(encoded):
        open_image(picture).save(f"{i}.png")
    return [f"{i}.png" for i in range(len(encoded))]


def test_predict_agrees_with_the_library_and_the_pipeline(saved, learnt, pictures):
    from transformers import pipeline

    found = json.loads(run("predict", saved, *pictures, "--json"))
    expected = learnt.model.predict(pictures)
    model = ContinualModel.from_pretrained(saved)
    classify = pipeline("image-classification", model=model, image_processor=model.backbone.processor)
    for row, prediction, scores in zip(found, expected, classify([Image.open(p) for p in pictures]), strict=True):
        assert (row["label"], row["expert"]) == (prediction.label, prediction.expert)
        assert row["label"] == scores[0]["label"] and row["score"] == pytest.approx(scores[0]["score"], abs=1e-5)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save("noise.png")
    rejected = json.loads(run("predict", saved, "noise.png", "--reject_rate", "0.05", "--top_k", "3", "--as_json"))[0]
    assert rejected["label"] is None and len(rejected["classes"]) == len(rejected["experts"]) == 3
    table = run("predict", saved, *pictures)
    assert "{" not in table
    assert all(name in table for name in ("label", "score", "expert", "distance", pictures[0]))


def test_predict_takes_folders_patterns_and_lists_and_goes_on_after_what_it_cannot_read(saved, pictures):
    Path("more/deep").mkdir(parents=True)
    for place, name in zip(("more", "more/deep", "."), pictures, strict=False):
        Path(name).rename(Path(place, name))
    Path("more/broken.png").write_bytes(b"\x89PNG")
    Path("more/notes.txt").write_text("no picture")
    wanted = [f"more/{pictures[0]}", f"more/deep/{pictures[1]}", pictures[2]]
    done = run("predict", saved, "more", pictures[2], "--format", "jsonl", "--batch_size", "1", fails=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(row["image"] for row in rows) == sorted(wanted) and done.exit_code == 1
    assert "broken.png" in done.stderr and "notes.txt" not in done.stderr
    assert len(json.loads(run("predict", saved, "more/**/[0-9]*.png", "--json"))) == 2
    lines = "\n".join([*wanted, "nowhere.png"])
    listed = CliRunner().invoke(cli.app, ["predict", str(saved), "-", "--format", "csv", "--top-k", "2"], input=lines)
    table = list(csv.DictReader(listed.stdout.splitlines()))
    assert [row["image"] for row in table] == wanted and "nowhere.png" in listed.stderr and listed.exit_code == 1
    assert float(table[0]["classes 1 value"]) >= float(table[0]["classes 2 value"])
    for source in ("nowhere", "more/*.gif", str(saved / "experts")):
        assert run("predict", saved, source, fails=True).exit_code == 2
    assert json.loads(run("predict", saved, wanted[0], "--json"))[0]["label"] == table[0]["label"]


def test_predict_sorts_pictures_and_replaces_none(saved, learnt, pictures):
    for option in ("--copy_to", "--copy-to"):
        run("predict", saved, *pictures, option, "sorted")
    rows = json.loads(run("predict", saved, *pictures, "--json"))
    for row in rows:
        assert Path("sorted", row["label"], row["image"]).read_bytes() == Path(row["image"]).read_bytes()
    assert len(list(Path("sorted").rglob("*.png"))) == len(rows)


def test_an_empty_list_of_pictures_is_no_error(saved):
    for form, printed in (("csv", "image,label,score"), ("table", "label  score"), ("json", "[]"), ("jsonl", "")):
        done = CliRunner().invoke(cli.app, ["predict", str(saved), "-", "--format", form], input="")
        assert done.exit_code == 0 and done.stdout.startswith(printed) and len(done.stdout.splitlines()) <= 1
        assert "The list is empty" in done.stderr


def test_info_says_what_was_learnt_without_downloading_weights(hub, learnt):
    learnt.model.push_to_hub(REPO, token="hf_alice")
    hub.log.clear()
    text = run("info", f"{REPO}@task-002")
    assert not hub.requests("GET", "/lfs/")
    assert "s_lora" in text and "task-001" in text and "2, 3" in text and "routing accuracy" in text
    values = json.loads(run("info", REPO, "--json"))
    assert values["classes"] == ["0", "1", "2", "3", "4", "5"]
    assert values["metrics"] == pytest.approx(learnt.report.summary())


def test_info_and_push_need_no_method_at_hand(hub, saved):
    values = json.loads(run("info", saved, "--json"))
    assert values["method"] == "s_lora" and values["options"]["k"] == 10 and values["method is at hand"]
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["method"] |= {"name": "mine", "depth": 3}
    path.write_text(json.dumps(config))
    assert not json.loads(run("info", saved, "--json"))["method is at hand"]
    text = run("info", saved)
    assert "mine, which is not at hand: import the file that defines it" in text and "k = 10" in text
    assert "depth = 3" in text
    run("push", saved, REPO, "--token", "hf_alice")
    assert json.loads(hub.repo(REPO).files()["config.json"])["method"]["depth"] == 3


def test_push_then_everything_else_from_the_hub(hub, saved, pictures):
    address = json.loads(run("push", saved, REPO, "--token", "hf_alice", "-m", "By hand", "--json"))["address"]
    assert f"{hub.url}/{REPO}/commit/" in address and hub.repo(REPO).commits()[0].title == "By hand"
    assert json.loads(run("predict", f"{REPO}@task-002", pictures[0], "--json"))[0]["label"]


def test_push_sends_what_a_run_could_not(hub, learnt, monkeypatch):
    from conftest import make_trainer
    from huggingface_hub import constants

    from hf_clpeft import s_lora
    from hf_clpeft.hub import push

    monkeypatch.setattr(push, "RETRY_DELAYS", (0, 0))
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": "hf_alice", "num_train_epochs": 1}
    trainer = make_trainer(s_lora(k=1), "out", **options)
    hub.faults.append(Fault("POST", "/commit/", status=503, times=10**6))
    for task in learnt.stream[:2]:
        trainer.learn(task)
    hub.faults.clear()
    Path(constants.HF_TOKEN_PATH).write_text("hf_alice")  # as `hf auth login` does
    try:
        assert json.loads(run("push", "out", "--json"))["tasks that had waited"] == 2
        assert list(hub.repo(REPO).tags) == ["task-000", "task-001"]
        assert json.loads(run("push", "out", "--json"))["tasks that had waited"] == 0
    finally:
        Path(constants.HF_TOKEN_PATH).unlink()
    assert len(hub.repo(REPO).commits()) == 3


def test_combine_writes_a_model(saved, tmp_path):
    import shutil

    other = shutil.copytree(saved, tmp_path / "other")
    values = json.loads(run("combine", saved, other, "-o", "both", "--json"))
    assert len(values["tasks"]) == 6 and values["classes"] == 6
    assert len(ContinualModel.from_pretrained("both").bank) == 6


def test_export_gives_an_adapter_or_a_plain_classifier(saved):
    run("export", saved, "task-001", "-o", "adapter")
    assert {path.name for path in Path("adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    run("export", saved, "task-001", "-o", "merged", "--merge")
    config = json.loads(Path("merged/config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"] and config["id2label"] == {"0": "2", "1": "3"}


def test_migrate_renames_an_old_adapter(saved):
    from safetensors.torch import load_file, save_file

    folder = saved / "experts" / "task-000"
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {
        key.replace("layers.", "encoder.layer.").replace("n.q_proj", "n.attention.query"): tensors[key]
        for key in tensors
    }
    old = {key.replace("n.v_proj", "n.attention.value"): tensor for key, tensor in old.items()}
    save_file(old, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query", "value"]}))
    values = json.loads(run("migrate", folder, "-o", "new", "--backbone", "hf-clpeft/vit-tiny-glyphs", "--json"))
    assert values["renamed"] == len(tensors)
    assert load_file("new/adapter_model.safetensors").keys() == tensors.keys()


@pytest.mark.usefixtures("deep")
def test_env_and_test(saved):
    assert json.loads(run("env", "--json"))["accelerator"]
    results = json.loads(run("test", "--json"))
    assert results["learns"] and results["routes"] and results["loads what it saved"]


def command(*words):
    """Runs the command as it is installed."""
    script = Path(sys.executable).with_name("hf-clpeft")
    return subprocess.run([script, *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("info", "alice/nothing"), 1, "error: Cannot load alice/nothing"),
        (("info", "s-lora-digits"), 1, "no such folder, .* OWNER/NAME. Did you mean hf-clpeft/s-lora-digits.$"),
        (("predict", "hf-clpeft/s-lora-digit", "bomb.png"), 1, "no such folder, .* Did you mean hf-clpeft/s-lora-di"),
        (("predict", "MODEL", "nothing.png"), 2, "nothing.png"),
        (("predict", "MODEL", "MODEL/config.json"), 1, "error: .*config.json is not a valid image"),
        (("predict", "nothing", "bomb.png", "--copy_to", "bomb.png/x"), 2, "--copy-to bomb.png/x: bomb.png is a file"),
        (("export", "nothing", "--int8", "-o", "x"), 2, "--int8 goes with --onnx"),
        (("predict", "MODEL", "bomb.png"), 1, "error: bomb.png is not a valid image: .*bomb"),
        (("export", "MODEL", "task-009", "-o", "x"), 1, "error: .*task-009"),
        (("combine", "MODEL", "-o", "x"), 1, "error: Combining needs two models"),
        (("push", "MODEL"), 1, "error: .* does not say which repo"),
        (("push", "nothing", "alice/digits"), 1, "error: nothing is neither a folder nor one of hf-clpeft/s-lora-d"),
        (("info", "."), 1, "error: . holds no config.json"),
        (("sing",), 2, "No such command"),
    ],
)
def test_mistakes_end_in_one_line_and_an_exit_code(hub, saved, words, code, message, monkeypatch, capfd):
    Image.new("1", (20_000, 20_000)).save("bomb.png")  # 50 kB that would become 1.2 GB
    monkeypatch.setattr(sys, "argv", ["hf-clpeft", *(word.replace("MODEL", str(saved)) for word in words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said, status = capfd.readouterr().err, ended.value.code
    if isinstance(status, str):  # which Python prints
        said, status = f"{said}{status}\n", 1
    assert status == code and re.search(message, said), said
    assert "Traceback" not in said
    if code == 1:
        assert len(said.strip().splitlines()) == 1, said


def test_a_mistake_ends_the_installed_command_in_one_line(hub, learnt):
    done = command("info", "alice/nothing")
    assert done.returncode == 1 and done.stderr.startswith("error: Cannot load alice/nothing")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_help_is_there_at_once(learnt):
    code = "import sys, hf_clpeft.cli; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    text = run("--help")
    assert all(name in text for name in "info predict combine push export migrate env test".split())
