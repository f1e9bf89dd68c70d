"""What the server serves: users and their repositories."""

import hashlib
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .repo import File, HubError, Repo


if TYPE_CHECKING:
    from .serving import Fault

LFS_SUFFIXES = tuple(".arrow .bin .ckpt .jpg .npz .parquet .pkl .png .pt .pth .safetensors .tar .tar.gz .zip".split())
LFS_SIZE = 10 * 2**20  # larger files are LFS files whatever their names


@dataclass
class User:
    """Whom a token belongs to: `namespaces` are readable and, if `role` is `"write"`, writable with it."""

    name: str
    namespaces: list[str]
    role: str = "write"


class Hub:
    """What the server serves, for tests to look at and to change without HTTP.

    Args:
        users (`dict[str, User]`, *optional*): Users by token. By default `hf_alice` writes to `alice` and to the
            organization `lab`, `hf_bob` to `bob`, and `hf_reader` is a token of alice's that only reads.

    Attributes:
        url (`str`): Address, once served.
        gated (`set[str]`): Ids of repositories whose files need terms to be accepted, which nobody has done.
        renamed (`dict[str, str]`): New ids by old ones, from which requests are redirected.
        xet_storage (`str`, *optional*): Where large files are sent to and had from by clients that speak Xet. This
            server does not, so the address is for what happens when that storage refuses.
        faults (`list[Fault]`): The first that strikes decides about a request.
        log (`list` of `(method, path, headers)`): Every request so far; paths as sent, without the query.
    """

    def __init__(self, users: dict[str, User] | None = None):
        self.users = users or {
            "hf_alice": User("alice", ["alice", "lab"]),
            "hf_bob": User("bob", ["bob"]),
            "hf_reader": User("alice", ["alice", "lab"], role="read"),
        }
        self.url = ""
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}  # by type and id
        self.gated: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.xet_storage: str | None = None
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, dict[str, str]]] = []

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def requests(self, method: str, path: str) -> list[tuple[str, str, dict[str, str]]]:
        """The logged requests whose method and path match two regular expressions, as in [`Fault`]."""
        return [entry for entry in list(self.log) if re.fullmatch(method, entry[0]) and re.search(path, entry[1])]

    def create(self, repo_id: str, repo_type: str = "model", private: bool = False) -> Repo:
        with self.lock:
            if (repo_type, repo_id) in self.repos:
                raise HubError(409, f"You already created this {repo_type} repo")
            return self.repos.setdefault((repo_type, repo_id), Repo(repo_id, repo_type, private))

    def commit(
        self,
        repo_id: str,
        files: dict[str, bytes | None],
        title: str = "planted",
        revision: str = "main",
        repo_type: str = "model",
        private: bool = False,
    ) -> str:
        """Plants files straight into a repository.

        Args:
            repo_id (`str`): Repository. If it is missing, it is made.
            files (`dict[str, bytes | None]`): Contents by path; `None` deletes.
            title (`str`): Title of the commit.
            revision (`str`): Branch, or ref of a pull request.
            repo_type (`str`): Type of the repository.
            private (`bool`): Whether a repository made by this is private.

        Returns:
            `str`: Sha of the commit.
        """
        with self.lock:
            repo = self.repos.get((repo_type, repo_id)) or self.create(repo_id, repo_type, private)
        changes: list[tuple[str, File | None]] = []
        for path, data in files.items():
            if data is not None and is_lfs(path, data[:512], len(data)):
                oid = hashlib.sha256(data).hexdigest()
                repo.objects[oid] = data
                changes.append((path, File.lfs(oid, len(data))))
            else:
                changes.append((path, None if data is None else File.regular(data)))
        return repo.commit(revision, changes, title, author=repo_id.split("/")[0]).sha

    def reset(self) -> None:
        """Forgets all repositories, faults and requests."""
        with self.lock:
            self.repos.clear()
        self.gated.clear()
        self.renamed.clear()
        self.xet_storage = None
        self.faults.clear()
        self.log.clear()


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)
