"""The server that stands in for the Hugging Face Hub, through the client it is made for."""

import time
from pathlib import Path

import pytest
from hub_server import Fault, serve
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session


REPO = "alice/model"
CARD = """---
license: apache-2.0
base_model: google/vit-base-patch16-224
tags: [peft]
model-index:
- name: model
  results:
  - task: {type: image-classification}
    dataset: {type: digits, name: Digits}
    metrics:
    - {type: accuracy, value: 0.5}
---
# A model
"""


@pytest.fixture(scope="module")
def server():
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))  # retry at once
    server.reset()
    return server


@pytest.fixture
def api(hub):
    """Alice's client, and an empty repository of hers."""
    api = HfApi(endpoint=hub.url, token="hf_alice")
    api.create_repo(REPO)
    return api


def add(api, files, **options):
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(REPO, operations, **{"commit_message": "Add", **options})


def test_files_small_and_large_make_the_round_trip(hub, api, tmp_path):
    big = bytes(range(256)) * 20_000
    files = {"README.md": CARD.encode(), "task_1/ü + %.json": b"{}", "task_1/weights.safetensors": big, "empty": b""}
    files |= {f"task_1/{i}.bin": bytes([i]) * 1000 for i in range(12)}  # uploads run in parallel
    commit = add(api, files)
    assert hub.repo(REPO).files() == files
    assert [commit.oid] == [entry.sha for entry in hub.repo(REPO).commits()][:1]
    for revision in ("main", commit.oid):
        cache = tmp_path / revision
        folder = snapshot_download(REPO, revision=revision, cache_dir=cache, endpoint=hub.url, token="hf_alice")
        assert {path: Path(folder, path).read_bytes() for path in files} == files
    assert len(hub.requests("PUT", "/lfs/")) == 13
    assert not any("authorization" in headers for _, _, headers in hub.requests("GET", "/lfs/"))
    hub.log.clear()
    add(api, {"copy.bin": big})  # the content is known by now
    assert not hub.requests("PUT", "/lfs/")


def test_parts_of_files(hub, api):
    add(api, {"f": b"0123456789", "f.bin": b"0123456789"})
    for name in ("f", "f.bin"):
        for span, content in {"2-4": b"234", "7-": b"789", "8-99": b"89", "10-": b""}.items():
            url, headers = f"{hub.url}/{REPO}/resolve/main/{name}", {"Range": f"bytes={span}"}
            answer = get_session().get(url, headers=headers)
            assert (answer.status_code, answer.content) == (206 if content else 416, content)


def test_listings(hub, api):
    add(api, {"README.md": CARD.encode(), "a/b/c.bin": b"12345", "a/d.txt": b"1"})
    api.create_commit(REPO, [CommitOperationDelete("a/b/")], commit_message="Drop a folder")
    assert api.list_repo_files(REPO) == ["README.md", "a/d.txt"]
    first = api.list_repo_commits(REPO)[1].commit_id
    assert [entry.path for entry in api.list_repo_tree(REPO, revision=first)] == ["README.md", "a"]
    below = [entry.path for entry in api.list_repo_tree(REPO, "a", revision=first, recursive=True)]
    assert below == ["a/b", "a/b/c.bin", "a/d.txt"]
    folder, file = api.get_paths_info(REPO, ["a/b", "a/b/c.bin", "missing"], revision=first)
    assert (folder.path, file.size, file.lfs.size) == ("a/b", 5, 5)
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Drop a folder", "Add", "initial commit"]
    info = api.model_info(REPO, files_metadata=True)
    assert info.card_data.base_model == "google/vit-base-patch16-224"
    assert [sibling.size for sibling in info.siblings] == [len(CARD), 1]
    hub.commit("bob/other", {"README.md": b"---\ntags: [vision]\n---\n"})
    assert [model.id for model in api.list_models(filter="peft")] == [REPO]
    assert [model.id for model in api.list_models(author="bob", search="OTH")] == ["bob/other"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("nowhere", REPO)


def test_branches_and_tags(hub, api, tmp_path):
    old = add(api, {"f": b"old"}).oid
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="dev/x", revision=old)
    add(api, {"f": b"new"}, revision="dev/x")
    assert hub.repo(REPO).tags == {"v1": old}
    assert hub.repo(REPO).files("v1") == hub.repo(REPO).files() == {"f": b"old"}
    path = hf_hub_download(REPO, "f", revision="dev/x", cache_dir=tmp_path, endpoint=hub.url, token=False)
    assert Path(path).read_text() == "new"
    assert {ref.ref for ref in api.list_repo_refs(REPO).branches} == {"refs/heads/main", "refs/heads/dev/x"}
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="dev/x")
    for revision in ("v1", "dev/x"):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=revision)


def test_who_may_do_what(hub, api):
    bob, reader, nobody = (HfApi(endpoint=hub.url, token=token) for token in ("hf_bob", "hf_reader", False))
    hub.commit("alice/secret", {"f": b"1"}, private=True)
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert reader.list_repo_files("alice/secret") == ["f"]
    for stranger in (bob, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("alice/secret")
        assert [model.id for model in stranger.list_models()] == [REPO]
    for other in (bob, reader):
        other.auth_check(REPO)
        with pytest.raises(HfHubHTTPError, match="403"):
            other.auth_check(REPO, write=True)
        with pytest.raises(HfHubHTTPError, match="403"):
            other.create_repo("lab/mine")
        with pytest.raises(HfHubHTTPError, match="403"):
            add(other, {"f": b"1"})
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_stolen").whoami()
    api.update_repo_settings("alice/secret", private=False)
    assert bob.repo_exists("alice/secret")
    assert api.create_repo("lab/data", repo_type="dataset", private=True).repo_type == "dataset"
    add_to = {"repo_id": "lab/data", "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=b"\0rows", path_in_repo="rows.parquet", **add_to)
    assert hub.repo("lab/data", "dataset").files() == {"rows.parquet": b"\0rows"}
    api.delete_repo("lab/data", repo_type="dataset")
    assert not api.repo_exists("lab/data", repo_type="dataset")


def test_a_stale_parent_is_refused(hub, api):
    parent = hub.repo(REPO).at().sha

    def overtake():
        hub.commit(REPO, {"theirs": b"1"})

    hub.faults.append(Fault("POST", "/commit/main", before=overtake))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        add(api, {"mine": b"1"}, parent_commit=parent)
    assert error.value.response.status_code == 412
    assert set(hub.repo(REPO).files()) == {"theirs"}
    add(api, {"mine": b"1"}, parent_commit=hub.repo(REPO).at().sha)


def test_a_pull_request_is_a_ref_of_its_own(hub, api, tmp_path):
    base = add(api, {"f": b"old"}).oid
    bob = HfApi(endpoint=hub.url, token="hf_bob")
    commit = add(bob, {"f": b"new", "weights.bin": b"\0"}, create_pr=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert commit.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.repo(REPO).at().sha == base
    add(bob, {"g": b"more"}, revision="refs/pr/1")
    assert [c.commit_id for c in api.list_repo_commits(REPO, revision="refs/pr/1")][1:3] == [commit.oid, base]
    path = hf_hub_download(REPO, "f", revision="refs/pr/1", cache_dir=tmp_path, endpoint=hub.url, token=False)
    assert Path(path).read_text() == "new"
    assert [ref.name for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == ["1"]
    add(api, {"f": b"newer"})
    assert add(api, {"f": b"2"}, create_pr=True, parent_commit=base).pr_num == 2  # from there, though it is not newest
    assert hub.repo(REPO).commits("refs/pr/2")[1].sha == base


def test_squashing_leaves_what_refs_lead_to(hub, api):
    lost = add(api, {"weights.bin": b"first"}).oid
    tagged = add(api, {"weights.bin": b"second"}).oid
    api.create_tag(REPO, tag="v1")
    api.super_squash_history(REPO, commit_message="One")
    assert [commit.title for commit in hub.repo(REPO).commits()] == ["One"]
    assert hub.repo(REPO).files() == {"weights.bin": b"second"}
    assert api.model_info(REPO, revision="v1").sha == api.model_info(REPO, revision=tagged).sha == tagged
    assert hub.repo(REPO).commits("v1")[1].sha == lost
    api.delete_tag(REPO, tag="v1")
    for sha in (lost, tagged):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=sha)
    assert [(file.filename, file.size) for file in api.list_lfs_files(REPO)] == [("weights.bin", 6)]


@pytest.mark.parametrize("rewrite", [True, False])
def test_lfs_files_can_be_deleted_for_good(hub, api, tmp_path, rewrite):
    add(api, {"old.bin": b"old", "kept.bin": b"kept"})
    before = hub.repo(REPO).at().sha
    old = [file for file in api.list_lfs_files(REPO) if file.filename == "old.bin"]
    api.permanently_delete_lfs_files(REPO, old, rewrite_history=rewrite)
    assert [file.filename for file in api.list_lfs_files(REPO)] == ["kept.bin"]
    assert api.model_info(REPO).used_storage == 4
    assert (hub.repo(REPO).at().sha == before) is not rewrite
    assert ("old.bin" in api.list_repo_files(REPO)) is not rewrite
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "old.bin", cache_dir=tmp_path, endpoint=hub.url, token="hf_alice")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: apache-2.0", "license: apache", '"license" must be one of'),
        ("google/vit-base-patch16-224", "./runs/vit/last", '"base_model" with value "./runs/vit/last"'),
        ("[peft]", "peft", '"tags" must be an array'),
        ("[peft]", "[peft, 1]", r'"tags\[1\]" must be a string'),
        ("- name: model", "-", r'"model-index\[0\].name" is required'),
        ("type: digits, ", "", r'results\[0\].dataset.type" is required'),
        ("value: 0.5", "value: .nan", r'metrics\[0\].value" must be a number'),
        ("value: 0.5", "value: [0.5]", r'metrics\[0\].value" must be a number'),
        ("tags: [peft]", "tags: [peft", "cannot be read"),
    ],
)
def test_metadata_is_really_validated(hub, api, old, new, message):
    broken = CARD.replace(old, new)
    assert broken != CARD
    with pytest.raises(ValueError, match=message):
        add(api, {"README.md": broken.encode()})
    add(api, {"README.md": CARD.encode()})


def test_cards_validate_themselves(hub, api, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    card = ModelCard(CARD)
    card.validate()
    card.data.license = "apache"
    with pytest.raises(ValueError, match='"license.* must be one of'):
        card.validate()
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        add(api, {"README.md": b"# No metadata"})


def test_an_answer_can_be_an_error(hub, api):
    hub.faults.append(Fault("POST", "/preupload/", status=503, skip=1, times=2))
    add(api, {"f": b"1"})
    add(api, {"f": b"2"})  # the client tries again
    assert len(hub.requests("POST", "/preupload/")) == 4
    hub.faults.append(Fault("POST", "/commit/", status=429, headers={"Retry-After": "7"}))
    with pytest.raises(HfHubHTTPError, match="429") as error:  # and it does not try commits again
        add(api, {"f": b"3"})
    assert error.value.response.headers["Retry-After"] == "7"
    assert hub.repo(REPO).files() == {"f": b"2"}
    add(api, {"f": b"3"})


def test_a_connection_can_be_cut(hub, api):
    hub.faults += [Fault("PUT", "/lfs/", cut=True), Fault("POST", "/commit/", cut=True)]
    with pytest.raises(Exception, match="disconnected|reset"):
        add(api, {"weights.bin": bytes(5_000_000)})
    assert len(hub.requests("PUT", "/lfs/")) == 2  # the upload was tried again, the commit was not
    assert len(hub.repo(REPO).commits()) == 1
    add(api, {"weights.bin": bytes(5_000_000)})
    assert hub.repo(REPO).files() == {"weights.bin": bytes(5_000_000)}


@pytest.mark.parametrize("loss", [{"status": 504}, {"cut": True}])
def test_a_commit_can_land_and_its_answer_get_lost(hub, api, loss):
    hub.faults.append(Fault("POST", "/commit/", apply=True, **loss))
    with pytest.raises(Exception, match="504|disconnected|reset"):
        add(api, {"f": b"1"})
    assert hub.repo(REPO).files() == {"f": b"1"}
    add(api, {"f": b"1"})  # nothing is left to do
    assert len(hub.requests("POST", "/commit/")) == 1


def test_an_answer_can_take_its_time(hub, api):
    hub.faults.append(Fault("GET", f"^/api/models/{REPO}$", delay=0.5))
    start = time.monotonic()
    api.model_info(REPO)
    assert time.monotonic() - start >= 0.5
