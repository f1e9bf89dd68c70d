"""Pushes a model's folder to the Hub as one commit, tagged with its latest task's name."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from .. import __version__
from ..backbones.bundled import ASSETS
from ..config.checks import read_json
from ..config.errors import ConfigError
from ..config.hub_client import hub_client
from ..config.hub_errors import HfHubHTTPError, HubError, explained, transferring
from ..config.model import CONFIG_NAME, ContinualConfig
from ..config.text import get_logger
from ..reports.card import CARD_NAME, make_card
from ..reports.report import METRICS_NAME, REPORT_FILES, StreamReport
from ..storage.files import EXPERTS_FOLDER, WEIGHTS, check_files, sums_file
from ..storage.lineage import difference
from ..storage.pictures import EXAMPLES, thumbnails_file


if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = get_logger(__name__)

RETRY_DELAYS = (1, 4)  # seconds before the second and the third attempt
T = TypeVar("T")


@dataclass(frozen=True)
class PushTarget:
    """Where on the Hub to push a model.

    Args:
        repo_id (`str`): Repo id, created if missing; its namespace defaults to the token's owner.
        token (`str`, *optional*): Access token; default: the one saved by `hf auth login`. Never stored.
        private (`bool`, *optional*): Whether a new repo is private; default: its owner's setting.
        revision (`str`, *optional*): Branch, created if missing; default: main.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of moving the branch.

    Example:

    ```py
    >>> from hf_clpeft.hub.push import PushTarget

    >>> PushTarget("me/digits", token="secret")
    PushTarget(repo_id='me/digits', private=None, revision=None, create_pr=False)

    ```
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False

    def prepare(self, config: ContinualConfig) -> tuple["PushTarget", list[str]]:
        """Creates the repo and the branch if missing, and checks that the model may be pushed there.

        Returns:
            [`PushTarget`]: With the full repo id; and the names of the tasks that the repo has.

        Raises:
            [`HubError`]: The Hub cannot be reached, denies the request, or holds another model.
        """
        api = hub_client(self.token)

        def attempt() -> tuple["PushTarget", list[str]]:
            ready = self._create(api)
            there = _read_head(api, ready).config
            _check_lineage(config, there, ready.repo_id)
            return ready, _names(there) if there is not None else []

        return _retrying(attempt, "push to", self.repo_id)

    def reserve(self) -> "PushTarget":
        """Creates the repo and the branch if missing: whether the token may write is known before any work.

        Returns:
            [`PushTarget`]: With the full repo id.

        Raises:
            [`HubError`]: The Hub cannot be reached or denies the request.
        """
        return _retrying(lambda: self._create(hub_client(self.token)), "push to", self.repo_id)

    def _create(self, api: "HfApi") -> "PushTarget":
        repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=not self.create_pr)
        if self.revision is not None and not self.create_pr:
            api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        return replace(self, repo_id=repo_id)


def push_folder(
    folder: str | Path,
    target: PushTarget,
    message: str | None = None,
    squash_history: bool = False,
    handler: bool = False,
) -> str:
    """Pushes a model's folder in one commit; files that the repo has already are not uploaded again.

    If the branch moves in the meantime, the push is retried on its new head, if that is an earlier state of the same
    model. The commit is tagged with the latest task's name. An existing tag is moved if it points to an earlier
    state of this model; if it points to another model, the new tag gets the branch's name as a prefix.

    Args:
        folder (`str` or `Path`): What [`~ContinualModel.save_pretrained`] wrote.
        target ([`PushTarget`]): Where to push.
        message (`str`, *optional*): Title of the commit; default: the tasks learnt and removed.
        squash_history (`bool`, *optional*, defaults to `False`): Squash the branch into this commit, and delete the
            tags and orphaned LFS files that still hold a removed task.
        handler (`bool`, *optional*, defaults to `False`): Add `handler.py` and `requirements.txt`, by which Inference
            Endpoints serve the model. Later pushes leave them there.

    Returns:
        `str`: URL of the commit or pull request.

    Raises:
        [`HubError`]: The Hub cannot be reached, denies the request, or holds another model. Commits are atomic.
    """
    folder = Path(folder)
    config = ContinualConfig.load(folder)
    check_files(folder, config)  # only what config.json lists and hashes is uploaded
    if squash_history and target.create_pr:
        raise ConfigError("A pull request leaves the branch as it is, so squash_history needs create_pr=False.")
    if Path(config.backbone.name_or_path).is_dir():
        logger.warning(
            "The backbone is the folder %s, which others do not have: they will need from_pretrained(..., backbone=).",
            config.backbone.name_or_path,
        )
    api = hub_client(target.token)

    def attempt() -> str:
        ready = target._create(api)
        head = _read_head(api, ready)
        _check_lineage(config, head.config, ready.repo_id)
        text = message or _what_changed(config, head.config)
        changes = _changes(folder, config, head, ready.repo_id) + (_endpoint() if handler else [])
        with transferring():
            commit = api.create_commit(
                ready.repo_id,
                changes,
                commit_message=text,
                revision=ready.revision,
                parent_commit=head.commit,
                create_pr=ready.create_pr,
            )
        if ready.create_pr:
            assert commit.pr_url is not None
            return commit.pr_url
        oid = _squash(api, ready, config, text) if squash_history else commit.oid
        if config.tasks:
            _tag(api, ready, config, oid)
        return commit.commit_url

    return _retrying(attempt, "push to", target.repo_id)


@dataclass(frozen=True)
class _Head:
    """The head of a branch: commit, files, and the model's configuration, if it holds one."""

    commit: str
    files: set[str]
    config: ContinualConfig | None


def _read_head(api: "HfApi", target: PushTarget, revision: str | None = None) -> _Head:
    revision = revision or (None if target.create_pr else target.revision)
    info: Any = api.repo_info(target.repo_id, revision=revision)
    files = {sibling.rfilename for sibling in info.siblings or []}
    if CONFIG_NAME not in files:
        if weights := sorted(name for name in files if Path(name).suffix in WEIGHTS):
            raise HubError(f"{target.repo_id} holds {weights[0]} of another library's model. Push to another repo.")
        return _Head(info.sha, files, None)
    with TemporaryDirectory() as folder:
        with transferring():
            api.hf_hub_download(target.repo_id, CONFIG_NAME, revision=info.sha, local_dir=folder)
        try:
            return _Head(info.sha, files, ContinualConfig.load(folder))
        except ConfigError as error:
            raise HubError(
                f"{target.repo_id} does not hold an hf_clpeft model ({error}). Push to another repo."
            ) from error


def _check_lineage(config: ContinualConfig, there: ContinualConfig | None, repo_id: str) -> None:
    """Raises unless the repo is empty or holds an earlier state of this model: no push overwrites another model."""
    what = None if there is None else difference(config, there)
    if what is None:
        return
    raise HubError(
        f"{repo_id} holds another model: {what}. Continue that one (from_pretrained({repo_id!r}), or "
        f"--resume_from_checkpoint {repo_id}), or push to another repo or branch."
    )


def _names(config: ContinualConfig) -> list[str]:
    return [task.name for task in config.tasks]


def _what_changed(config: ContinualConfig, there: ContinualConfig | None) -> str:
    before = _names(there) if there is not None else []
    learnt = [task for task in config.tasks if task.name not in before]
    removed = [name for name in before if name not in _names(config)]
    if len(learnt) == 1 and not removed:
        return f"Learn {learnt[0].name}: {learnt[0].title}"
    parts = ["Learn " + ", ".join(task.name for task in learnt)] * bool(learnt)
    parts += ["Remove " + ", ".join(removed)] * bool(removed)
    return "; ".join(parts) or "Update the model"


def _changes(folder: Path, config: ContinualConfig, head: _Head, repo_id: str) -> list:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    known = head.config.files if head.config is not None else {}
    reports = [name for name in REPORT_FILES if (folder / name).is_file() and not (folder / name).is_symlink()]
    sent = [path for path, digest in config.files.items() if known.get(path) != digest or path not in head.files]
    report = None
    if METRICS_NAME in reports:
        report = StreamReport.from_dict(read_json(folder / METRICS_NAME), config.tasks)
    card = str(make_card(config, report, repo_id, ask=True)).encode()
    gone = (known.keys() - config.files.keys()) | (set(REPORT_FILES) - set(reports))
    return [
        *(CommitOperationAdd(path, folder / path) for path in [*sent, *reports, CONFIG_NAME]),
        CommitOperationAdd(CARD_NAME, card),
        *(CommitOperationDelete(path) for path in sorted(gone & head.files)),
    ]


def _endpoint() -> list:
    """What Inference Endpoints look for in a repo."""
    from huggingface_hub import CommitOperationAdd

    needed = f"hf-clpeft>={__version__}\n".encode()
    return [
        CommitOperationAdd("handler.py", ASSETS / "endpoint" / "handler.py"),
        CommitOperationAdd("requirements.txt", needed),
    ]


def _squash(api: "HfApi", target: PushTarget, config: ContinualConfig, message: str) -> str:
    """Squashes the branch and deletes what still holds a removed task. Returns the new commit."""
    branch, removed = target.revision or "main", set(config.removed)
    api.super_squash_history(target.repo_id, branch=branch, commit_message=message)
    for tag in api.list_repo_refs(target.repo_id).tags:
        there = _read_head(api, target, tag.target_commit).config
        if there is not None and removed & {*_names(there), *there.removed}:  # or an ancestor of the tag holds it
            api.delete_tag(target.repo_id, tag=tag.name)
    theirs = tuple(
        prefix
        for name in config.removed
        for prefix in (f"{EXPERTS_FOLDER}/{name}/", sums_file(name), thumbnails_file(name), f"{EXAMPLES}/{name}-")
    )
    orphans = [file for file in api.list_lfs_files(target.repo_id) if theirs and file.filename.startswith(theirs)]
    if orphans:
        api.permanently_delete_lfs_files(target.repo_id, orphans, rewrite_history=False)
    squashed: Any = api.repo_info(target.repo_id, revision=branch)
    return squashed.sha


def _tag(api: "HfApi", target: PushTarget, config: ContinualConfig, commit: str) -> None:
    """Tags a commit with its latest task; with branch and task, if that tag points to another model."""
    task, repo_id = config.tasks[-1].name, target.repo_id
    names = task, f"{target.revision or 'main'}-{task}".replace("/", "-")
    tagged = next((name for name in names if _set_tag(api, target, config, commit, name)), None)
    if tagged is None:
        logger.warning("The tags %s of %s point to other models; %s has none.", " and ".join(names), repo_id, commit)
    elif tagged != task:
        logger.warning("%s@%s is another model, so this one is %s@%s (its own tag).", repo_id, task, repo_id, tagged)


def _set_tag(api: "HfApi", target: PushTarget, config: ContinualConfig, commit: str, name: str) -> bool:
    """Creates or moves a tag, and returns whether it points to this model now."""
    repo_id = target.repo_id
    try:
        api.create_tag(repo_id, tag=name, revision=commit)
        return True
    except HfHubHTTPError as error:
        if error.response.status_code != 409:  # it exists
            raise
    old = next((tag.target_commit for tag in api.list_repo_refs(repo_id).tags if tag.name == name), None)
    if old is not None and old != commit:
        there = _read_head(api, target, old).config
        if there is not None and (there.tasks, there.files) == (config.tasks, config.files):
            return True
        if old not in {earlier.commit_id for earlier in api.list_repo_commits(repo_id, revision=commit)}:
            return False
        api.delete_tag(repo_id, tag=name)
        api.create_tag(repo_id, tag=name, revision=commit)
        logger.warning("%s@%s was an earlier state of this model, %s; now it is this one.", repo_id, name, old[:7])
    return True


def _retrying(attempt: Callable[[], T], doing: str, repo_id: str) -> T:
    """Calls a function that may fail, and retries after transient errors."""
    for wait in (*RETRY_DELAYS, None):
        try:
            with explained(doing, repo_id):
                return attempt()
        except HubError as error:
            if wait is None or not error.transient:
                raise
            logger.info("%s Next attempt in %d s.", error, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")
