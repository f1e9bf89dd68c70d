"""What the Hub may answer, and the one line that a user reads then."""

import logging
import re
import time

import pytest
from conftest import make_trainer, pattern_dataset
from hub_server import Fault
from huggingface_hub import constants
from typer.testing import CliRunner

from hf_clpeft import ContinualModel, ContinualTrainer, HubError, TaskStream, cli, s_lora
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.config import ContinualConfig
from hf_clpeft.config.hub_errors import HTTPError, explained, transferring
from hf_clpeft.hub import push
from hf_clpeft.hub.download import find_model
from hf_clpeft.hub.outbox import Outbox
from hf_clpeft.training.recipe import run_recipe


REPO, CLOSED = "alice/model", "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(push, "RETRY_DELAYS", (0, 0))


@pytest.fixture(scope="module")
def model():
    return ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")


@pytest.fixture
def pushed(hub):
    """A repo with a model, put there without a client."""
    folder = bundled_folder("hf-clpeft/s-lora-digits")
    names = [*ContinualConfig.load(folder).files, "config.json", "metrics.json"]
    hub.commit(REPO, {name: (folder / name).read_bytes() for name in names})
    return hub.repo(REPO)


@pytest.fixture
def xet(hub, monkeypatch):
    """The client speaks Xet, and the storage that the Hub names is at a closed address."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    hub.xet_storage = CLOSED


def load(**options):
    return ContinualModel.from_pretrained(REPO, **{"cache_dir": "cache", **options})


def line_of(error):
    text = str(error.value)
    assert "\n" not in text and 40 < len(text) < 500
    return text


ANY = {"method": ".*", "path": ".*", "times": 10**6}
BUSY = Fault(**ANY, status=429, headers={"Retry-After": "1"})


@pytest.mark.parametrize(
    "token, faults, told",
    [
        ("hf_alice", [BUSY], r"the Hub answers 429 \(This went wrong on purpose\)\. Try again later\."),
        ("hf_alice", [Fault(**ANY, status=503)], r"the Hub answers 503 .* Try again later\."),
        ("hf_alice", [Fault(**ANY, status=403)], r"the Hub answers 403 .* no read access"),
        ("hf_nobody", [], r"the Hub answers 401 \(Invalid cred.*\)\. The token is not valid; log in"),
        (
            "hf_alice",
            [Fault(**ANY, cut=True)],
            r"http://127.* cannot be reached \(\w+\), and the files are not in",
        ),
        (False, [Fault(**ANY, status=401)], r"the Hub answers 401 .* Log in with `hf auth login`"),
        ("hf_alice", [Fault(**ANY, status=401)], r"the Hub answers 401 .* The token is not valid"),
    ],
    ids=["429", "503", "403", "bad token", "dead", "no token", "expired token"],
)
def test_loading_what_the_hub_does_not_give_is_told_in_one_line(hub, pushed, token, faults, told):
    hub.faults.extend(faults)
    with pytest.raises(HubError, match=f"Cannot load {REPO}: .*{told}") as error:
        load(token=token)
    line_of(error)


@pytest.mark.parametrize(
    "repo, token, told",
    [
        ("bob/model", "hf_alice", r"the Hub answers 403 \(You don't have the rights .*\)\. The token has no write"),
        (REPO, "hf_reader", "the Hub answers 403 .* no write access"),
        (REPO, "hf_nobody", "the Hub answers 401 .* The token is not valid"),
        (REPO, False, "the Hub answers 401 .* Log in with `hf auth login`"),
        ("model", False, "there is no token|Log in with `hf auth login`"),
        ("lab/../x", "hf_alice", "it is not a valid repo id"),
    ],
)
def test_pushing_what_the_hub_does_not_take_is_told_in_one_line(hub, model, repo, token, told):
    with pytest.raises(HubError, match=f"Cannot push to .*{told}") as error:
        model.push_to_hub(repo, token=token)
    assert "no such folder" not in line_of(error)  # which has nothing to do with it


def test_a_private_repo_of_others_and_one_that_is_missing_are_told_alike_by_status(hub, pushed):
    pushed.private = True
    with pytest.raises(HubError, match=r"private and the token has no access to it \(it answers 404\)") as error:
        load(token="hf_bob")
    line_of(error)
    with pytest.raises(HubError, match=r"private and you are not logged in \(it answers 401\)") as error:
        load(token=False)
    line_of(error)


@pytest.mark.parametrize("token", ["hf_alice", False])
def test_gated_repos_say_where_to_accept_the_terms(hub, pushed, token):
    hub.gated.add(REPO)
    with pytest.raises(HubError, match=f"repo is gated .* Accept its terms on {hub.url}/{REPO}, and log in") as error:
        load(token=token)
    line_of(error)


def test_a_renamed_repo_is_found(hub, pushed, model):
    hub.renamed["old/name"] = REPO
    loaded = ContinualModel.from_pretrained("old/name", cache_dir="cache")
    assert loaded.config.classes == model.config.classes
    loaded.config.license = "mit"
    loaded.push_to_hub("old/name", token="hf_alice")
    assert ContinualModel.from_pretrained(REPO).config.license == "mit"


@pytest.mark.parametrize("fault", [BUSY, Fault(**ANY, status=503), Fault(**ANY, cut=True)], ids=["429", "503", "cut"])
def test_what_is_in_the_cache_is_used_when_the_hub_gives_nothing_and_that_is_said(
    hub, pushed, caplog, fault, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    expected = load().config
    hub.faults.append(fault)
    assert load().config == expected
    assert "cache" in caplog.text and REPO in caplog.text


def test_offline_mode_is_named(pushed, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError, match="HF_HUB_OFFLINE=1 forbids requests to http.*, and the files are not in"
    ) as error:
        load()
    line_of(error)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE=1 forbids requests to .* A saved model can be pushed later"):
        model.push_to_hub(REPO, token="hf_alice")


def test_looking_for_a_repo_to_go_on_with_needs_a_token_for_its_owner(hub):
    with pytest.raises(HubError, match="Cannot look for model: there is no token. Log in"):
        find_model("model")


# Xet


def test_a_storage_that_takes_nothing_leaves_the_tasks_in_the_outbox_and_learning_goes_on(hub, xet, caplog):
    stream = TaskStream.class_incremental(pattern_dataset(4), num_tasks=2)
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": "hf_alice", "num_train_epochs": 1}
    trainer = make_trainer(s_lora(k=1), **options)
    trainer.learn_stream(stream)
    assert len(Outbox("out").pending()) == len(trainer.model.config.tasks) == 2
    said = [record.getMessage() for record in caplog.records if "Learning goes on" in record.getMessage()]
    assert len(said) == 2 and all("\n" not in line for line in said)
    assert f"the storage of {hub.url} cannot be reached (Network error" in said[0]
    assert "If only Xet is blocked, set HF_HUB_DISABLE_XET=1" in said[0] and "hf-clpeft push out" in said[0]
    assert [commit.title for commit in hub.repo(REPO).commits()] == ["initial commit"]

    # Going on with the run works while the storage still takes nothing, too.
    ContinualTrainer(ContinualModel.from_pretrained("out"), trainer.args)
    hub.xet_storage = None
    constants.HF_HUB_DISABLE_XET = True
    Outbox("out").flush(push.PushTarget(REPO, "hf_alice"))
    assert list(hub.repo(REPO).tags) == ["task-000", "task-001"]


def test_the_command_says_that_it_pushes_and_ends_in_one_line(hub, xet, model):
    model.save_pretrained("saved")
    start = time.time()
    result = CliRunner().invoke(cli.app, ["push", "saved", REPO, "--token", "hf_alice"])
    assert isinstance(result.exception, HubError) and time.time() - start < 30
    assert f"Pushing saved to {REPO}" in result.stderr and "storage of" in str(result.exception)
    assert "next" not in result.stdout


def test_a_storage_that_gives_nothing_is_told_in_one_line(hub, pushed, xet):
    with pytest.raises(HubError, match=f"Cannot load {REPO}: the storage of {hub.url} cannot be reached") as error:
        load()
    line_of(error)


def test_a_refused_token_of_the_storage_is_told(hub, pushed, xet, model):
    hub.faults.append(Fault("GET", "/xet-", status=403, times=10**6))
    with pytest.raises(HubError, match="Cannot load") as error:
        load()
    assert "\n" not in str(error.value)
    hub.faults[:] = [Fault("GET", "/xet-write", status=403, times=10**6)]
    with pytest.raises(HubError, match="Cannot push to") as error:
        model.push_to_hub("alice/other", token="hf_alice")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [ConnectionError("reset"), RuntimeError("Task error"), TimeoutError("slow"), ValueError("no header")]
)
def test_only_while_files_move_is_a_builtin_error_one_of_the_hub(error):
    told = "Cannot push to me/x: the storage of .* cannot be reached"
    with pytest.raises(HubError, match=told), explained("push to", "me/x"), transferring():
        raise error
    if isinstance(error, RuntimeError | ValueError):  # elsewhere it is a mistake of ours
        with pytest.raises(type(error), match=f"^{error}$"), explained("push to", "me/x"):
            raise error


def test_an_address_that_is_no_hub_is_told(hub, pushed):
    hub.faults.append(Fault("HEAD", "/resolve/", status=200, times=10**6))  # without what the client needs to know
    with pytest.raises(HubError, match=f"Cannot load {REPO}: {hub.url} does not answer like a Hub") as error:
        load()
    assert "\n" not in str(error.value)


def test_what_is_not_in_the_cache_and_must_not_be_asked_for(pushed):
    with pytest.raises(HubError, match="it is not in the cache, and local_files_only=True forbids") as error:
        load(local_files_only=True)
    line_of(error)


def test_errors_of_this_disk_stay_what_they_are():
    with pytest.raises(PermissionError), explained("load", "me/x"), transferring():
        raise PermissionError(13, "Permission denied", "cache")


def test_the_clients_own_library_is_asked_for_its_errors():
    from huggingface_hub import utils

    assert issubclass(utils.HfHubHTTPError, HTTPError) and re.match("httpx2?$", HTTPError.__module__)


def test_a_push_that_waits_does_not_end_with_a_command_that_shows_the_repo(hub, capsys):
    small = "--num_tasks 2 --max_train_samples_per_task 16 --max_test_samples_per_task 5 --num_train_epochs 1"
    options = [*small.split(), "--disable_tqdm", "--output_dir", "out", "--push_to_hub", "--hub_token", "hf_alice"]
    hub.faults.append(Fault("POST", "/commit/", status=503, times=10**6))
    run_recipe("s_lora", argv=["--benchmark", "digits", *options])
    said = capsys.readouterr().out
    assert "next: hf-clpeft push out" in said and "demo" not in said
    hub.faults.clear()
    run_recipe("s_lora", argv=["--benchmark", "digits", *options, "--resume_from_checkpoint", "auto"])
    assert "next: hf-clpeft demo alice/out" in capsys.readouterr().out
