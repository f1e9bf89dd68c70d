"""From the Hub: what is needed, from one commit, and nothing that cannot be trusted."""

import json

import pytest
import torch
from hub_server import Fault

from hf_clpeft import BackboneError, ConfigError, ContinualModel, HubError, load_backbone
from hf_clpeft.hub.download import fetch_config


REPO = "alice/model"
pytestmark = [
    pytest.mark.usefixtures("shallow"),
    pytest.mark.parametrize("learnt", ["s_lora"], indirect=True),
]


@pytest.fixture
def pushed(hub, learnt):
    learnt.model.push_to_hub(REPO, token="hf_alice")
    return hub.repo(REPO)


def pixels():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load(**options):
    return ContinualModel.from_pretrained(REPO, **{"cache_dir": "cache", **options})


def test_only_what_a_model_is_loaded_from_is_downloaded_once(hub, pushed):
    load()
    got = {path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in hub.requests("GET", "/resolve/")}
    assert "README.md" not in got and "accuracy_and_routing.png" not in got and "config.json" in got
    hub.log.clear()
    load()
    assert [path for _, path, _ in hub.log] == [f"/api/models/{REPO}"]  # which commit main is now


def test_everything_comes_from_one_commit_even_if_the_repo_changes_meanwhile(hub, pushed, learnt):
    def push_another():
        hub.commit(REPO, {"config.json": b"{}", "heads.safetensors": b"nonsense"})

    hub.faults.append(Fault("GET", "/tree/", before=push_another))
    with torch.no_grad():
        torch.testing.assert_close(load()(pixels()).logits, learnt.model(pixels()).logits)


def test_without_a_network_the_cache_will_do(hub, pushed):
    expected = load().config
    hub.faults.append(Fault(".*", ".*", cut=True, times=10**6))
    assert load(local_files_only=True).config == load().config == expected
    with pytest.raises(HubError, match="cannot be reached .* and the files are not in the cache"):
        load(cache_dir="other")
    with pytest.raises(HubError, match="not in the cache"):
        load(cache_dir="other", local_files_only=True)


def test_a_download_that_broke_off_is_taken_up_again(hub, pushed):
    hub.faults.append(Fault("GET", "/lfs/", status=503, skip=1, times=10**6))
    with pytest.raises(HubError):
        load()
    hub.faults.clear()
    with pytest.raises(HubError, match="only a part of it is in the cache"):
        load(local_files_only=True)
    assert load().config.tasks


@pytest.mark.parametrize(
    "repo, revision, message",
    [
        ("alice/nothing", None, "no such folder, and http.* has no such model repo"),
        (REPO, "task-009", "no revision 'task-009'"),
        ("out/of/nowhere", None, "no such folder, and it is not a valid repo id"),
    ],
)
def test_what_is_not_there_is_named(pushed, repo, revision, message):
    with pytest.raises(HubError, match=message):
        ContinualModel.from_pretrained(repo, revision=revision)


@pytest.mark.parametrize("cached", [False, True])
def test_a_hub_that_is_gone_is_asked_once_and_not_again_and_again(hub, pushed, monkeypatch, cached):
    if cached:
        fetch_config(REPO, cache_dir="cache")  # but not the weights
    hub.faults.append(Fault(".*", ".*", cut=True, times=10**6))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for the Hub to come back"))
    with pytest.raises(HubError, match="cannot be reached"):
        load()


def edited(pushed, edit):
    config = json.loads(pushed.files()["config.json"])
    edit(config)
    return json.dumps(config).encode()


BROKEN = {
    "pickle": (lambda repo: {"training_state.pkl": b"boo"}, ConfigError, "training_state.pkl, which can run code"),
    "pickle in a folder": (lambda repo: {"old/pytorch_model.bin": b"boo"}, ConfigError, "old/pytorch_model.bin"),
    "10 MB of configuration": (
        lambda repo: {"config.json": edited(repo, lambda c: c["versions"].update(padding="x" * 10_000_000))},
        ConfigError,
        "config.json with 10,00.,... bytes; at most",
    ),
    "missing expert file": (
        lambda repo: {"experts/task-001/adapter_model.safetensors": None},
        ConfigError,
        "lacks the file experts/task-001/adapter_model.safetensors",
    ),
    "unknown expert": (
        lambda repo: {"experts/task-009/adapter_model.safetensors": b"boo"},
        ConfigError,
        "experts/task-009/adapter_model.safetensors, which its config.json does not know",
    ),
    "expert of somebody else": (
        lambda repo: {"experts/task-001/adapter_model.safetensors": b"boo"},
        ConfigError,
        "is not the file that config.json vouches for",
    ),
    "no model": (lambda repo: {"config.json": None}, ConfigError, "holds no config.json"),
    "another library's model": (lambda repo: {"config.json": b'{"model_type": "vit"}'}, ConfigError, "format_version"),
    "backbone at an absolute path": (
        lambda repo: {"config.json": edited(repo, lambda c: c["backbone"].update(name_or_path="/etc"))},
        ConfigError,
        "names its backbone by a path, '/etc'",
    ),
    "backbone at a path with ..": (
        lambda repo: {"config.json": edited(repo, lambda c: c["backbone"].update(name_or_path="../x"))},
        ConfigError,
        "names its backbone by a path, '../x'",
    ),
    "file at a path with ..": (
        lambda repo: {"config.json": edited(repo, lambda c: c["files"].update({"../x": "0" * 64}))},
        ConfigError,
        "Path '../x' must be relative",
    ),
    "wrong backbone hash": (
        lambda repo: {"config.json": edited(repo, lambda c: c["backbone"].update(weight_hash="0" * 64))},
        BackboneError,
        "hash to .* but alice/model was trained on .* with 000000000000",
    ),
    "backbone that is not there": (
        lambda repo: {"config.json": edited(repo, lambda c: c["backbone"].update(name_or_path="alice/vit"))},
        BackboneError,
        "backbone 'alice/vit' cannot be loaded .* backbone=",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_repo_is_refused_every_time(hub, pushed, what):
    change, error, message = BROKEN[what]
    hub.commit(REPO, change(pushed))
    for _ in range(2):  # the second time, some of it is in the cache
        with pytest.raises(error, match=message):
            load()


def test_a_big_configuration_is_not_even_downloaded(hub, pushed):
    hub.commit(REPO, BROKEN["10 MB of configuration"][0](pushed))
    with pytest.raises(ConfigError):
        load()
    assert not hub.requests("GET", "/resolve/.*config.json")


def test_an_expert_loads_with_plain_peft_from_a_subfolder(pushed, learnt):
    from peft import PeftModel

    for position, name in enumerate(learnt.model.bank.names):
        backbone = load_backbone("hf-clpeft/vit-tiny-glyphs").model
        expert = PeftModel.from_pretrained(backbone, REPO, subfolder=f"experts/{name}")
        with torch.no_grad():
            found = expert(pixel_values=pixels()).last_hidden_state[:, 0]
            expected = learnt.model.bank(pixels(), torch.full((8,), position))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_what_a_model_is_can_be_read_without_its_weights(hub, pushed):
    folder = fetch_config(REPO, "task-002", cache_dir="cache")
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.json"}
    assert not hub.requests("GET", "/lfs/")


def test_a_pulled_model_goes_on_learning_and_its_old_answers_stay_bit_identical(pushed, learnt):
    from dataclasses import replace

    from hf_clpeft import ContinualTrainer, load_benchmark

    new = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=16)[4]
    model, before = load(), load()
    args = replace(learnt.args, output_dir="out", push_to_hub=True, hub_model_id=REPO, hub_token="hf_alice")
    ContinualTrainer(model, args).learn(new)
    again = load()
    assert pushed.commits()[0].title == "Learn task-004: 8, 9" and "task-004" in pushed.tags
    assert len(pushed.commits()) == 3  # as it was pushed, and one more
    for old, expert in zip(before.bank, again.bank, strict=False):
        assert all(torch.equal(old.tensors[key], expert.tensors[key]) for key in old.tensors)
    count = len(before.router.prototypes)
    assert torch.equal(again.router.prototypes[:count], before.router.prototypes)
    with torch.no_grad():
        old, found = before(pixels()), again(pixels())
    stay = found.selection == old.selection
    assert stay.any() and torch.equal(found.distances[stay, :3], old.distances[stay])
    features = again.bank(pixels(), old.selection)
    assert torch.equal(again.heads(features, old.selection)[:, :6], old.logits)
