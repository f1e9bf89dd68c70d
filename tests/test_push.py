"""To the Hub: every task one commit and one tag, whatever goes wrong on the way."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, pattern_dataset
from hub_server import Fault, check_card
from huggingface_hub import HfApi, ModelCard
from PIL import ImageOps

from hf_clpeft import ConfigError, ContinualModel, ContinualTrainer, HubError, TaskStream, l2l, ranpac, s_lora
from hf_clpeft.hub import push
from hf_clpeft.hub.outbox import Outbox


pytestmark = pytest.mark.usefixtures("shallow")
REPO = "alice/model"
COMMIT, PUT = f"/api/models/{REPO}/commit/", "/lfs/"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Attempts follow one another at once; how often there are any stays as it is."""
    monkeypatch.setattr(push, "RETRY_DELAYS", (0, 0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def stream():
    return TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)


def trainer_to(folder="out", method=None, **options):
    options = {"hub_model_id": REPO, "hub_token": "hf_alice", **options}
    return make_trainer(method or s_lora(k=1), folder, num_train_epochs=1, push_to_hub=True, **options)


def logits(model):
    with torch.no_grad():
        return model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits


def other_images():
    """As many images of the same classes, but turned around."""
    return pattern_dataset(6).map(lambda row: {"image": ImageOps.mirror(row["image"])})


def titles(hub, revision="main"):
    return [commit.title for commit in hub.repo(REPO).commits(revision)]


LEARNT = ["Learn task-002: class 4, class 5", "Learn task-001: class 2, class 3", "Learn task-000: class 0, class 1"]


@pytest.mark.parametrize("method", [s_lora(k=1), l2l(pool_size=3, top_n=2)], ids=lambda method: method.name)
def test_every_task_is_one_commit_and_one_tag_that_predicts_what_the_model_did_then(hub, stream, method):
    trainer, then = trainer_to(method=method), []
    for task in stream:
        trainer.learn(task)
        then.append(logits(trainer.model))
    assert titles(hub) == [*LEARNT, "initial commit"]
    assert list(hub.repo(REPO).tags) == ["task-000", "task-001", "task-002"]
    for i, expected in enumerate(then):
        model = ContinualModel.from_pretrained(REPO, revision=f"task-00{i}", token="hf_alice")
        assert torch.equal(logits(model), expected) and len(model.report.tasks) == i + 1
    assert "hf_alice" not in "".join(p.read_text() for p in Path("out").rglob("*.json"))
    assert all(b"hf_alice" not in data for data in hub.repo(REPO).files().values())


@pytest.mark.usefixtures("drawn")
def test_only_what_is_new_is_sent(hub, stream):
    trainer_to(num_examples=0).learn_stream(stream)
    sent = [path for _, path, _ in hub.requests("PUT", PUT)]
    # An expert, the router, the head and the picture; nothing twice.
    assert len(sent) == 3 * 4


def test_the_card_is_valid_and_new_with_every_task(hub, stream):
    trainer_to().learn_stream(stream)
    card = ModelCard.load(REPO, token="hf_alice")
    assert check_card(str(card)) == ([], [])
    assert card.data.library_name == "hf-clpeft" and card.data.license == "apache-2.0"
    assert [result.metric_type for result in card.data.eval_results][0] == "accuracy"
    for revision, count in (("task-000", 1), ("main", 3)):
        text = hub.repo(REPO).files(revision)["README.md"].decode()
        assert (
            f'from_pretrained("{REPO}")' in text and len(re.findall(r"^\| task-00\d \|", text, re.MULTILINE)) == count
        )


def test_private_repos_and_branches(hub, stream):
    trainer = trainer_to(hub_private_repo=True, hub_revision="nightly")
    trainer.learn(stream[0])
    assert hub.repo(REPO).private and titles(hub) == ["initial commit"]
    assert titles(hub, "nightly") == [LEARNT[2], "initial commit"]
    with pytest.raises(HubError, match="no such model repo, or it is private"):
        ContinualModel.from_pretrained(REPO, revision="nightly", token="hf_bob")
    ContinualModel.from_pretrained(REPO, revision="nightly", token="hf_alice")


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_model_is_pushed_on_demand_with_a_message_or_as_a_pull_request(hub, saved):
    model = ContinualModel.from_pretrained(saved)
    assert "/commit/" in model.push_to_hub(REPO, token="hf_alice", commit_message="Here it is")
    assert titles(hub) == ["Here it is", "initial commit"] and list(hub.repo(REPO).tags) == ["task-002"]
    model.config.license = "mit"
    assert "/discussions/1" in model.push_to_hub(REPO, token="hf_alice", create_pr=True)
    assert len(titles(hub)) == 2
    assert ContinualModel.from_pretrained(REPO, revision="refs/pr/1").config.license == "mit"


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_repo_that_has_it_all_gets_no_commit(hub, saved):
    model = ContinualModel.from_pretrained(saved)
    model.push_to_hub(REPO, token="hf_alice")
    model.push_to_hub(REPO, token="hf_alice")
    assert len(titles(hub)) == 2


FAULTS = {
    "503": [Fault("POST", COMMIT, status=503)],
    "503 while uploading": [Fault("PUT", PUT, status=503, times=2)],
    "cut upload": [Fault("PUT", PUT, cut=True)],
    "cut commit": [Fault("POST", COMMIT, cut=True)],
    "commit whose answer is lost": [Fault("POST", COMMIT, apply=True, cut=True)],
    "commit without tag": [Fault("POST", f"/api/models/{REPO}/tag/", status=503)],
    "stale parent": [
        Fault(
            "POST",
            COMMIT,
            before=lambda: HfApi(token="hf_alice").upload_file(
                path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id=REPO
            ),
        )
    ],
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_passes_is_tried_again(hub, stream, what, caplog):
    trainer = trainer_to()
    hub.faults.extend(FAULTS[what])
    trainer.learn(stream[0])
    pushed = [title for title in titles(hub) if title.startswith("Learn")]
    assert pushed == LEARNT[2:] and list(hub.repo(REPO).tags) == ["task-000"]
    assert not caplog.records or "Learning goes on" not in caplog.text
    assert torch.equal(logits(ContinualModel.from_pretrained(REPO)), logits(trainer.model))
    assert ("notes.txt" in hub.repo(REPO).files()) == (what == "stale parent")


def test_learning_goes_on_without_the_hub_and_every_task_gets_its_commit_later(hub, stream, caplog):
    trainer, then = trainer_to(), []
    for i, task in enumerate(stream):
        if i == 1:
            hub.faults.append(Fault(".*", ".*", cut=True, times=10**6))
        trainer.learn(task)
        then.append(logits(trainer.model))
    assert [path.name for path in Outbox("out").pending()] == ["00002-task-001", "00003-task-002"]
    assert "2 tasks wait in out/outbox; they go with the next task, or with: hf-clpeft push out" in caplog.text
    assert titles(hub) == [LEARNT[2], "initial commit"]
    hub.faults.clear()
    outbox = Outbox("out")
    outbox.flush(replace(outbox.target, token="hf_alice"))
    assert titles(hub) == [*LEARNT, "initial commit"] and not outbox.pending()
    for i, expected in enumerate(then):
        assert torch.equal(logits(ContinualModel.from_pretrained(REPO, revision=f"task-00{i}")), expected)


def test_a_push_that_failed_goes_with_the_next_task(hub, stream):
    trainer = trainer_to()
    hub.faults.append(Fault("POST", COMMIT, status=503, times=3))
    trainer.learn(stream[0])
    assert titles(hub) == ["initial commit"]
    trainer.learn(stream[1])
    assert titles(hub) == [*LEARNT[1:], "initial commit"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hub_token": "hf_reader"}, "no write access|rights"),
        ({"hub_token": "hf_nobody"}, "token is not valid"),
        ({"hub_model_id": "bob/model"}, "rights"),
        ({"hub_model_id": "not a repo"}, "not a valid repo id"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_learnt(hub, options, message):
    with pytest.raises(HubError, match=message):
        trainer_to(**options)


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_a_token_that_only_reads_is_refused_for_a_repo_that_is_there(hub, saved):
    ContinualModel.from_pretrained(saved).push_to_hub(REPO, token="hf_alice")
    with pytest.raises(HubError, match="no write access"):
        trainer_to(hub_token="hf_reader")


def test_a_hub_that_is_not_there_is_noticed_before_anything_is_learnt(hub):
    hub.faults.append(Fault(".*", ".*", cut=True, times=10**6))
    with pytest.raises(HubError, match="cannot be reached"):
        trainer_to()


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_another_model_is_not_pushed_away(hub, stream, saved):
    trainer_to().learn_stream(stream[:2])
    with pytest.raises(HubError, match="holds another model: one that has learnt task-000, task-001, which this one"):
        trainer_to("elsewhere")
    with pytest.raises(HubError, match="one of the method s_lora"):
        trainer_to("elsewhere", l2l())
    with pytest.raises(HubError, match="one with another experts/task-000/adapter_model.safetensors"):
        ContinualModel.from_pretrained(saved).push_to_hub(REPO, token="hf_alice")
    hub.commit(REPO, {"config.json": b'{"model_type": "vit"}'})
    with pytest.raises(HubError, match="does not hold an hf_clpeft model"):
        trainer_to("elsewhere")


@pytest.mark.parametrize("method", [l2l(pool_size=3, top_n=2), ranpac(projection_size=64)], ids=lambda m: m.name)
def test_the_same_method_in_another_run_is_another_model(hub, stream, method):
    """Pools and controls have no experts by which runs could be told apart."""
    for folder, taught in (
        ("first", stream[:2]),
        ("second", TaskStream.class_incremental(other_images(), num_tasks=3)[:2]),
    ):
        trainer = make_trainer(method, folder, num_train_epochs=1)
        trainer.learn_stream(taught)
    first, second = (ContinualModel.from_pretrained(folder) for folder in ("first", "second"))
    first.push_to_hub(REPO, token="hf_alice")
    with pytest.raises(HubError, match="holds another model: one that has learnt task-000 in another run. Continue"):
        second.push_to_hub(REPO, token="hf_alice")
    target = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": "hf_alice"}
    with pytest.raises(HubError, match="in another run.*, or push to another repo or branch"):
        ContinualTrainer(second, replace(trainer.args, **target))
    # What is there is no hindrance where it is an earlier state of the same model.
    first.config.license = "mit"
    first.push_to_hub(REPO, token="hf_alice")
    again = ContinualModel.from_pretrained(REPO)
    ContinualTrainer(again, replace(trainer.args, output_dir="more", **target)).learn(stream[2])
    assert list(hub.repo(REPO).tags) == ["task-001", "task-002"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_model.bin", "folder/model.safetensors"])
@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_weights_of_other_libraries_are_not_pushed_over(hub, saved, name):
    hub.commit(REPO, {name: b"weights", "README.md": b"# Mine"})
    with pytest.raises(HubError, match=f"holds {name} of another library's model. Push to another repo"):
        ContinualModel.from_pretrained(saved).push_to_hub(REPO, token="hf_alice")
    assert hub.repo(REPO).files()["README.md"] == b"# Mine"


def test_two_branches_of_one_repo_have_tags_of_their_own(hub, stream, caplog):
    args = trainer_to().args
    trainer_to().learn(stream[0])
    models = [ContinualModel.from_pretrained(REPO) for _ in range(2)]
    for model, branch in zip(models, ("main", "feature/b"), strict=True):
        options = {"output_dir": branch.replace("/", "-"), "hub_revision": branch, "seed": len(branch)}
        HfApi(token="hf_alice").create_branch(REPO, branch=branch, revision="task-000", exist_ok=True)
        ContinualTrainer(model, replace(args, **options)).learn(stream[1])
    assert f"{REPO}@task-001 is another model, so this one is {REPO}@feature-b-task-001" in caplog.text
    assert list(hub.repo(REPO).tags) == ["task-000", "task-001", "feature-b-task-001"]
    for model, tag in zip(models, ("task-001", "feature-b-task-001"), strict=True):
        assert torch.equal(logits(ContinualModel.from_pretrained(REPO, revision=tag)), logits(model))
    models[1].push_to_hub(REPO, token="hf_alice", revision="feature/b")  # nothing is new
    assert len(hub.repo(REPO).tags) == 3


def test_a_tag_moves_along_its_own_branch_and_never_from_a_stranger(hub, stream, caplog):
    trainer = trainer_to()
    trainer.learn_stream(stream[:2])
    trainer.model.remove("task-000")
    trainer.model.push_to_hub(REPO, token="hf_alice")
    assert f"{REPO}@task-001 was an earlier state of this model" in caplog.text
    repo = hub.repo(REPO)
    assert repo.tags["task-001"] == repo.at().sha
    HfApi(token="hf_alice").create_branch(REPO, branch="new", revision=repo.commits()[-1].sha)
    stranger = repo.tags["task-000"]
    trainer_to("other", hub_revision="new", seed=7).learn(stream[0])
    assert f"{REPO}@task-000 is another model, so this one is {REPO}@new-task-000" in caplog.text
    assert repo.tags["task-000"] == stranger
    repo.refs["refs/tags/task-001"] = repo.tags["new-task-000"]
    trainer.model.push_to_hub(REPO, token="hf_alice", revision="third")
    assert set(repo.tags) == {"task-000", "new-task-000", "task-001", "third-task-001"}


def test_somebody_who_learnt_on_meanwhile_is_not_pushed_away(hub, stream):
    trainer = trainer_to()
    trainer.learn(stream[0])
    other = ContinualModel.from_pretrained(REPO)
    ContinualTrainer(other, replace(trainer.args, output_dir="other", push_to_hub=False)).learn(stream[2])
    other.push_to_hub(REPO, token="hf_alice")
    trainer.learn(stream[1])  # the warning says what to do; the work is kept
    assert titles(hub) == [LEARNT[0], LEARNT[2], "initial commit"]
    with pytest.raises(HubError, match="has learnt task-002, which this one has not"):
        trainer.model.push_to_hub(REPO, token="hf_alice")


def test_a_removed_task_is_a_commit_of_its_own(hub, stream):
    trainer = trainer_to()
    trainer.learn_stream(stream)
    trainer.model.remove("task-001")
    trainer.model.push_to_hub(REPO, token="hf_alice")
    assert titles(hub) == ["Remove task-001", *LEARNT, "initial commit"]
    assert not any("task-001/" in name for name in hub.repo(REPO).files())
    assert ContinualModel.from_pretrained(REPO).config.classes == ["class 0", "class 1", "class 4", "class 5"]
    assert "task-001" in hub.repo(REPO).tags  # history stays, unless it is squashed


def test_squashing_leaves_nothing_of_a_removed_task(hub, stream):
    trainer = trainer_to()
    trainer.learn_stream(stream)
    secret = hub.repo(REPO).files()["experts/task-001/adapter_model.safetensors"]
    trainer.model.remove("task-001")
    trainer.model.push_to_hub(REPO, token="hf_alice", squash_history=True)
    repo = hub.repo(REPO)
    assert titles(hub) == ["Remove task-001"] and list(repo.tags) == ["task-000", "task-002"]
    assert repo.tags["task-002"] == repo.at().sha
    assert secret not in repo.objects.values()
    assert torch.equal(logits(ContinualModel.from_pretrained(REPO)), logits(trainer.model))
    ContinualModel.from_pretrained(REPO, revision="task-000")
    with pytest.raises(ConfigError, match="squash_history needs create_pr=False"):
        trainer.model.push_to_hub(REPO, token="hf_alice", squash_history=True, create_pr=True)


def test_tasks_of_another_run_that_wait_in_the_folder_are_not_lost(hub, stream):
    trainer = trainer_to()
    hub.faults.append(Fault("POST", COMMIT, status=503, times=10**6))
    trainer.learn(stream[0])
    hub.faults.clear()
    with pytest.raises(ConfigError, match="1 tasks of another run wait in out/outbox"):
        trainer_to()


def test_a_disk_without_hard_links_will_do(hub, stream, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    trainer_to().learn(stream[0])
    assert titles(hub) == [LEARNT[2], "initial commit"]


def test_a_backbone_in_a_folder_is_pushed_with_a_warning_and_refused_by_name(hub, stream, caplog, fresh_backbone):
    fresh_backbone.model.save_pretrained("backbone")
    fresh_backbone.processor.save_pretrained("backbone")
    model = ContinualModel.from_backbone(str(Path("backbone").absolute()), s_lora(k=1))
    ContinualTrainer(model, make_trainer(s_lora(), num_train_epochs=1).args).learn(stream[0])
    with caplog.at_level(logging.WARNING):
        model.push_to_hub(REPO, token="hf_alice")
    assert "which others do not have" in caplog.text
    with pytest.raises(ConfigError, match="names its backbone by a path, '/.*backbone', .* Pass backbone="):
        ContinualModel.from_pretrained(REPO)
    assert torch.equal(logits(ContinualModel.from_pretrained(REPO, backbone="backbone")), logits(model))


def test_the_target_is_remembered_without_the_token(hub, stream):
    trainer_to().learn(stream[0])
    assert json.loads(Path("out/outbox/target.json").read_text())["repo_id"] == REPO
    shutil.rmtree("out/outbox")
    with pytest.raises(ConfigError, match="does not say which repo"):
        Outbox("out")
