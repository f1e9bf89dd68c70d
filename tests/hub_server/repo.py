"""Repositories: commits, refs and files, without HTTP."""

import hashlib
import itertools
import threading
from dataclasses import dataclass, replace
from datetime import UTC, datetime


_numbers = itertools.count()  # so that no two commits have the same sha


class HubError(Exception):
    """A refusal, in the form the client tells its exceptions apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": ascii(message)[1:-1], **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class File:
    """A file of a commit. The content of an LFS file is in its repository's `objects`, under `sha256`."""

    oid: str  # of the content in git, which for an LFS file is a pointer
    size: int
    data: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> "File":
        return cls(hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data), data)

    @classmethod
    def lfs(cls, sha256: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return replace(cls.regular(pointer.encode()), size=size, data=None, sha256=sha256)


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    description: str
    author: str
    date: str
    parent: str | None
    files: dict[str, File]


class Repo:
    """A repository: commits, refs that lead to them, and LFS objects. Methods may be called from any thread."""

    def __init__(self, repo_id: str, repo_type: str = "model", private: bool = False):
        self.id, self.type, self.private, self.created = repo_id, repo_type, private, _now()
        self.lock = threading.RLock()
        self.history: dict[str, Commit] = {}  # by sha, parents first
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.refs = {"refs/heads/main": self._add({}, "initial commit").sha}

    @property
    def tags(self) -> dict[str, str]:
        return self.named("refs/tags/")

    def named(self, prefix: str) -> dict[str, str]:
        """Shas by name of the refs that begin with `refs/heads/`, `refs/tags/` or `refs/pr/`."""
        with self.lock:
            return {ref.removeprefix(prefix): sha for ref, sha in self.refs.items() if ref.startswith(prefix)}

    def at(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag, a whole ref or the beginning of a sha stands for."""
        with self.lock:
            for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
                if name in self.refs:
                    return self.history[self.refs[name]]
            for sha, commit in self.history.items():
                if len(revision) >= 5 and sha.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commits(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        with self.lock:
            commits = [self.at(revision)]
            while commits[-1].parent:
                commits.append(self.history[commits[-1].parent])
        return commits

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents of all files of a revision, by path."""
        return {path: self.content(file) for path, file in self.at(revision).files.items()}

    def content(self, file: File) -> bytes:
        data = self.objects.get(file.sha256) if file.sha256 else file.data
        if data is None:  # deleted for good, and the pointer was left
            raise HubError(404, f"LFS object {file.sha256} does not exist", "EntryNotFound")
        return data

    def commit(self, revision: str, changes: list[tuple[str, File | None]], title: str, **options) -> Commit:
        """Adds a commit to a branch or a pull request.

        Args:
            revision (`str`): Name of the branch, or ref of the pull request.
            changes (`list` of pairs): Paths, each with its new file or `None`, which deletes a file or, if the path
                ends with a slash, a folder.
            title (`str`): First line of the message.
            options: `description`, `author`, `parent` (beginning of the sha that must be the newest) and `new_ref`
                (set that ref instead, from `parent` if given).
        """
        parent, new_ref = options.pop("parent", None), options.pop("new_ref", None)
        with self.lock:
            ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
            base = self.at(ref)
            if new_ref:
                base, ref = self.at(parent) if parent else base, new_ref
            elif parent and not base.sha.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for path, file in changes:
                if file is not None:
                    if file.sha256 and file.sha256 not in self.objects:
                        raise HubError(400, f"LFS object {file.sha256} of {path} was not uploaded")
                    files[path] = file
                elif path.endswith("/"):
                    files = {other: file for other, file in files.items() if not other.startswith(path)}
                elif files.pop(path, None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            commit = self._add(files, title, parent=base.sha, **options)
            self.refs[ref] = commit.sha
        return commit

    def set_ref(self, ref: str, revision: str) -> None:
        with self.lock:
            if ref in self.refs:
                raise HubError(409, f"Reference already exists: {ref}")
            self.refs[ref] = self.at(revision).sha

    def delete_ref(self, ref: str) -> None:
        with self.lock:
            if self.refs.pop(ref, None) is None:
                raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
            self._forget()

    def squash(self, branch: str, title: str, author: str = "") -> None:
        """Makes a branch one commit without a parent."""
        with self.lock:
            files = self.at(f"refs/heads/{branch}").files
            self.refs[f"refs/heads/{branch}"] = self._add(files, title, author=author).sha
            self._forget()

    def delete_objects(self, oids: set[str], rewrite: bool) -> None:
        """Deletes LFS objects and, if the history is to be rewritten, their pointers from all commits."""
        with self.lock:
            for oid in oids:
                self.objects.pop(oid, None)
            if rewrite:
                new: dict[str | None, str | None] = {None: None}
                for old in list(self.history.values()):
                    files = {path: file for path, file in old.files.items() if file.sha256 not in oids}
                    changed = len(files) < len(old.files) or new[old.parent] != old.parent
                    options = {"description": old.description, "author": old.author, "parent": new[old.parent]}
                    new[old.sha] = self._add(files, old.title, **options).sha if changed else old.sha
                self.refs = {ref: new[sha] for ref, sha in self.refs.items()}
                self._forget()

    def _add(self, files: dict[str, File], title: str, description="", author="", parent=None) -> Commit:
        sha = hashlib.sha1(f"{self.id} {parent} {title} {next(_numbers)}".encode()).hexdigest()
        self.history[sha] = Commit(sha, title, description, author, _now(), parent, files)
        return self.history[sha]

    def _forget(self) -> None:
        """Drops commits that no ref leads to, and the LFS objects that only they had."""
        kept = {commit.sha for ref in self.refs for commit in self.commits(ref)}
        lost = {sha: commit for sha, commit in self.history.items() if sha not in kept}
        self.history = {sha: commit for sha, commit in self.history.items() if sha in kept}
        for oid in _lfs_oids(lost) - _lfs_oids(self.history):
            self.objects.pop(oid, None)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _lfs_oids(commits: dict[str, Commit]) -> set[str]:
    return {file.sha256 for commit in commits.values() for file in commit.files.values() if file.sha256}
