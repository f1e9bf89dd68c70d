"""A Hugging Face Hub in memory, on 127.0.0.1, for tests that use the unmodified `huggingface_hub` client.

Repositories have real commits, refs and LFS objects, and refusals are those of the Hub. It has no Xet, discussions or
pagination. Tests start one with [`serve`]. To try one by hand, run `python tests/hub_server.py --port 8765` and set
`HF_ENDPOINT=http://127.0.0.1:8765` and `HF_HUB_DISABLE_XET=1`.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, and the address is known only once the server runs. So this
file must not import it, except within functions.
"""

import argparse
import asyncio
import base64
import fnmatch
import hashlib
import itertools
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol


LFS_SUFFIXES = tuple(".arrow .bin .ckpt .jpg .npz .parquet .pkl .png .pt .pth .safetensors .tar .tar.gz .zip".split())
LFS_SIZE = 10 * 2**20  # larger files are LFS files whatever their names
LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0
    cc-by-3.0 cc-by-4.0 cc-by-nc-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0
    cdla-permissive-2.0 creativeml-openrail-m ecl-2.0 epl-2.0 eupl-1.1 gemma gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
    lgpl-3.0 llama2 llama3 llama3.1 llama3.2 mit mpl-2.0 ms-pl odbl openrail openrail++ osl-3.0 other pddl unknown
    unlicense wtfpl zlib
""".split()
METRIC = {"type": str, "value": int | float | str}
RESULT = {"task": {"type": str}, "dataset": {"type": str, "name": str}, "metrics": [METRIC]}
CARD = {  # what the metadata of a card must look like, besides `license` and `base_model`; any of it may be missing
    **{"datasets": [str], "tags": [str], "library_name": str, "pipeline_tag": str},
    "model-index": [{"name": str, "results": [RESULT]}],
}
YAML_BLOCK = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
_numbers = itertools.count()  # so that no two commits have the same sha


class HubError(Exception):
    """A refusal, in the form the client tells its exceptions apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": ascii(message)[1:-1], **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass
class User:
    """Whom a token belongs to: `namespaces` are readable and, if `role` is `"write"`, writable with it."""

    name: str
    namespaces: list[str]
    role: str = "write"


@dataclass
class Fault:
    """Something to go wrong with requests that match.

    Args:
        method (`str`): Regular expression that the whole method matches.
        path (`str`): Regular expression found somewhere in the path as sent (quoted, without a query).
        status (`int`, *optional*): Status to answer with.
        cut (`bool`): Drop the connection instead: once some of the body is read, before any answer.
        delay (`float`): Seconds to wait first.
        apply (`bool`): Carry the request out, and only then answer with `status` or drop the connection.
        before (`Callable`, *optional*): Called just before the request is handled. It may itself use the server.
        times (`int`): How many requests it strikes.
        skip (`int`): How many matching requests it lets pass first.
        headers (`dict[str, str]`): Sent along with `status`, for example `Retry-After`.
    """

    method: str
    path: str
    status: int | None = None
    cut: bool = False
    delay: float = 0.0
    apply: bool = False
    before: Callable[[], object] | None = None
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seen: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times


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


class Hub:
    """What the server serves, for tests to look at and to change without HTTP.

    Args:
        users (`dict[str, User]`, *optional*): Users by token. By default `hf_alice` writes to `alice` and to the
            organization `lab`, `hf_bob` to `bob`, and `hf_reader` is a token of alice's that only reads.

    Attributes:
        url (`str`): Address, once served.
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
            if data is not None and _is_lfs(path, data[:512], len(data)):
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
        self.faults.clear()
        self.log.clear()


def read_card(content: str) -> dict:
    block = YAML_BLOCK.match(content)
    try:
        card = (yaml.safe_load(block[1]) if block else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"YAML of the card cannot be read: {error}") from error
    if not isinstance(card, dict):
        raise ValueError("YAML of the card must be a mapping")
    return card


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata in the text of a README.md, much like the Hub's."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        card = read_card(content)
    except ValueError as error:
        return [str(error)], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [error for key in CARD.keys() & card.keys() for error in _mismatches(card[key], CARD[key], key)]
    for name in _listed(card, "license"):
        if name not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}], not "{name}"')
    for base_model in _listed(card, "base_model"):
        try:
            validate_repo_id(base_model)
        except HFValidationError:
            errors.append(f'"base_model" with value "{base_model}" is not valid. Use a model id from the Hub.')
    return sorted(errors), []


def _listed(card: dict, key: str) -> list:
    values = card.get(key, [])
    return values if isinstance(values, list) else [values]


def _mismatches(value: object, form, where: str) -> Iterator[str]:
    """What is wrong with a value, where the form is a type, a list with the form of elements, or a dict of forms."""
    if isinstance(form, dict) and isinstance(value, dict):
        for key, part in form.items():
            if key in value:
                yield from _mismatches(value[key], part, f"{where}.{key}")
            else:
                yield f'"{where}.{key}" is required'
    elif isinstance(form, list) and isinstance(value, list):
        for number, element in enumerate(value):
            yield from _mismatches(element, form[0], f"{where}[{number}]")
    elif isinstance(form, dict | list):
        yield f'"{where}" must be {"an object" if isinstance(form, dict) else "an array"}'
    elif not isinstance(value, form) or isinstance(value, bool) or (type(value) is float and not math.isfinite(value)):
        yield f'"{where}" must be {"a string" if form is str else "a number or a string"}'


@dataclass
class Call:
    """A request with what all handlers need of it: its body, the user who sends it and the repository it is about."""

    request: Request
    body: bytes
    user: User | None
    repo: Repo | None = None

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    @property
    def query(self):
        return self.request.query_params

    def page(self, repo_id: str, repo_type: str) -> str:
        return f"{self.request.base_url}{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


class Api:
    """The routes. Handlers run in threads, take a [`Call`] and parts of the path, and give a response or some JSON."""

    def __init__(self, hub: Hub):
        self.hub = hub

    def routes(self) -> list[Route]:
        repo, lfs = "/api/{type:type}/{repo_id:repo}", "/lfs/{type:type}/{repo_id:repo}/{oid:part}"
        table = [  # methods, path, handler, and the right to a repository that it takes
            ("GET", "/api/whoami-v2", self.whoami, None),
            ("POST", "/api/validate-yaml", self.validate_yaml, None),
            ("POST", "/api/repos/create", self.create_repo, None),
            ("DELETE", "/api/repos/delete", self.delete_repo, None),
            ("GET", "/api/{repo_type:type}", self.list_repos, None),
            ("GET", repo, self.info, "read"),
            ("GET", repo + "/revision/{revision:part}", self.info, "read"),
            ("GET", repo + "/auth-check", self.nothing, "read"),
            ("GET", repo + "/auth-check/write", self.nothing, "write"),
            ("PUT", repo + "/settings", self.settings, "write"),
            ("GET", repo + "/refs", self.list_refs, "read"),
            ("POST DELETE", repo + "/{kind:ref}/{name:part}", self.edit_ref, "write"),
            ("GET", repo + "/commits/{revision:part}", self.list_commits, "read"),
            ("GET", repo + "/tree/{revision:part}", self.tree, "read"),
            ("GET", repo + "/tree/{revision:part}/{path:rest}", self.tree, "read"),
            ("POST", repo + "/paths-info/{revision:part}", self.paths_info, "read"),
            ("POST", repo + "/preupload/{revision:part}", self.preupload, "commit"),
            ("POST", repo + "/commit/{revision:part}", self.commit, "commit"),
            ("POST", repo + "/super-squash/{branch:part}", self.squash, "write"),
            ("GET", repo + "/lfs-files", self.list_lfs, "read"),
            ("POST", repo + "/lfs-files/batch", self.delete_lfs, "write"),
            # who knows the address of an LFS object may use it, as with the signed addresses of the real storage
            ("PUT", lfs, self.put_object, "know"),
            ("GET", lfs, self.get_object, "know"),
            ("POST", lfs + "/verify", self.verify_object, "know"),
            ("GET", "/api/{_:type}/{name:part}", self.missing, None),
            ("GET", "/{name:part}/resolve/{_:rest}", self.missing, None),
        ]
        for prefix in ("/{type:type}", ""):  # models have none
            repo = prefix + "/{repo_id:repo}"
            table.append(("POST", repo + ".git/info/lfs/objects/batch", self.lfs_batch, "propose"))
            table.append(("GET", repo + "/resolve/{revision:part}/{path:rest}", self.resolve, "read"))
        return [Route(path, self._endpoint(*handler), methods=methods.split()) for methods, path, *handler in table]

    def _endpoint(self, handler: Callable, right: str | None) -> Callable:
        def handle(request: Request, body: bytes) -> Response:
            token, parts = request.headers.get("authorization", "").removeprefix("Bearer "), dict(request.path_params)
            if token and token not in self.hub.users:
                raise HubError(401, "Invalid credentials in Authorization header")
            call = Call(request, body, self.hub.users.get(token))
            if right is not None:
                call.repo = self._repo(call, parts.pop("repo_id"), parts.pop("type", "model"), right)
            result = handler(call, **parts)
            return result if isinstance(result, Response) else JSONResponse(result)

        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(handle, request, await request.body())

        return endpoint

    def _repo(self, call: Call, repo_id: str, repo_type: str, right: str) -> Repo:
        """The repository, if the user has the right to it."""
        namespace = repo_id.split("/")[0]
        repo = self.hub.repos.get((repo_type, repo_id))
        hidden = repo is not None and repo.private and not (call.user and namespace in call.user.namespaces)
        if repo is None or (hidden and right != "know"):
            self.missing(call)
        if right == "commit":  # anyone may propose a change
            to_branch = not call.request.path_params["revision"].startswith("refs/pr/")
            right = "write" if to_branch and "create_pr" not in call.query else "propose"
        if right in ("propose", "write"):
            self._check_writer(call, namespace if right == "write" else None)
        return repo

    def _check_writer(self, call: Call, namespace: str | None) -> None:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        if call.user.role != "write" or (namespace is not None and namespace not in call.user.namespaces):
            raise HubError(403, f"You don't have the rights to write to {namespace or 'any repository'}")

    def missing(self, call: Call, **_):
        # the Hub does not tell strangers whether a repository is missing or private
        raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")

    def nothing(self, call: Call):
        return {}

    def whoami(self, call: Call):
        if call.user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        name = call.user.name
        orgs = [{"type": "org", "name": namespace} for namespace in call.user.namespaces if namespace != name]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": call.user.role}}
        return {"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": auth}

    def validate_yaml(self, call: Call):
        errors, warnings = check_card(call.json["content"])
        messages = {"errors": errors, "warnings": warnings}
        answer = {key: [{"message": text} for text in texts] for key, texts in messages.items()}
        return JSONResponse(answer, 400 if errors else 200)

    def _named_in_body(self, call: Call) -> tuple[str, str]:
        namespace = call.json.get("organization") or (call.user.name if call.user else "")
        return f"{namespace}/{call.json['name']}", call.json.get("type") or "model"

    def create_repo(self, call: Call):
        repo_id, repo_type = self._named_in_body(call)
        self._check_writer(call, repo_id.split("/")[0])
        answer = {"url": call.page(repo_id, repo_type), "name": repo_id, "id": repo_id}
        try:
            self.hub.create(repo_id, repo_type, call.json.get("visibility") == "private")
        except HubError as error:  # with `exist_ok`, the client reads the address from the refusal
            return JSONResponse({"error": str(error), **answer}, error.status)
        return answer

    def delete_repo(self, call: Call):
        repo = self._repo(call, *self._named_in_body(call), "write")
        with self.hub.lock:
            self.hub.repos.pop((repo.type, repo.id), None)
        return {}

    def list_repos(self, call: Call, repo_type: str):
        mine, author = call.user.namespaces if call.user else [], call.query.get("author")
        wanted = set(call.query.getlist("filter") + call.query.getlist("pipeline_tag"))
        with self.hub.lock:
            repos, infos = [repo for repo in self.hub.repos.values() if repo.type == repo_type], []
        for repo in repos:
            namespace, info = repo.id.split("/")[0], _info(repo, repo.at())
            found = all(word.lower() in repo.id.lower() for word in call.query.getlist("search"))
            found = found and author in (None, namespace) and wanted <= set(info["tags"])
            if found and (not repo.private or namespace in mine):
                infos.append(info)
        return infos[: int(call.query.get("limit", 1000))]

    def info(self, call: Call, revision: str = "main"):
        return _info(call.repo, call.repo.at(revision), blobs="blobs" in call.query)

    def settings(self, call: Call):
        if "visibility" in call.json:
            call.repo.private = call.json["visibility"] == "private"
        return {"private": call.repo.private}

    def list_refs(self, call: Call):
        def entries(prefix: str) -> list[dict]:
            named = call.repo.named(prefix)
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in named.items()]

        pull_requests = entries("refs/pr/") if "include_prs" in call.query else []
        refs = {"branches": entries("refs/heads/"), "tags": entries("refs/tags/")}
        return {**refs, "converts": [], "pullRequests": pull_requests}

    def edit_ref(self, call: Call, kind: str, name: str):
        if call.request.method == "DELETE" and (kind, name) != ("heads", "main"):
            call.repo.delete_ref(f"refs/{kind}/{name}")
        elif call.request.method == "DELETE" or (kind == "heads" and name.startswith("refs/")):
            raise HubError(400, f"Invalid branch: {name}")
        elif kind == "tags":  # the path has the revision to tag
            call.repo.set_ref(f"refs/tags/{call.json['tag']}", name)
        else:
            call.repo.set_ref(f"refs/heads/{name}", call.json.get("startingPoint", "main"))
        return {}

    def list_commits(self, call: Call, revision: str):
        entries = []
        for commit in call.repo.commits(revision):
            message = {"title": commit.title, "message": commit.description, "authors": [{"user": commit.author}]}
            entries.append({"id": commit.sha, "date": commit.date, **message})
        return entries

    def tree(self, call: Call, revision: str, path: str = ""):
        prefix, entries = f"{path.strip('/')}/".lstrip("/"), {}
        recursive = call.query.get("recursive", "").lower() in ("true", "1")
        for name, file in sorted(call.repo.at(revision).files.items()):
            if name.startswith(prefix):
                *folders, _ = name.removeprefix(prefix).split("/")
                for depth in range(1, (len(folders) if recursive else min(len(folders), 1)) + 1):
                    folder = prefix + "/".join(folders[:depth])
                    entries[folder] = _folder_entry(folder)
                if recursive or not folders:
                    entries[name] = _file_entry(name, file)
        if prefix and not entries:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        return list(entries.values())

    def paths_info(self, call: Call, revision: str):
        files, entries = call.repo.at(revision).files, []
        for path in parse_qs(call.body.decode()).get("paths", []):
            path = path.strip("/")
            if path in files:
                entries.append(_file_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append(_folder_entry(path))
        return entries

    def preupload(self, call: Call, revision: str):
        commit, answers = call.repo.at(revision), []
        ignored = [line for line in call.json.get("gitIgnore", "").splitlines() if line and not line.startswith("#")]
        for new in call.json["files"]:
            path, old = new["path"], commit.files.get(new["path"])
            mode = "lfs" if _is_lfs(path, base64.b64decode(new["sample"]), new["size"]) else "regular"
            ignore = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
            oid = (old.sha256 or old.oid) if old else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        return {"commitOid": commit.sha, "files": answers}

    def commit(self, call: Call, revision: str):
        repo, header, changes = call.repo, {}, []
        for line in filter(None, call.body.splitlines()):
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                header = value
            elif key == "file":
                changes.append((value["path"], File.regular(base64.b64decode(value["content"]))))
            elif key == "lfsFile":
                size = len(repo.objects.get(value["oid"], b""))
                changes.append((value["path"], File.lfs(value["oid"], size)))
            elif key in ("deletedFile", "deletedFolder"):
                changes.append((value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""), None))
            else:
                raise HubError(400, f"Unknown operation {key}")
        options = {"description": header.get("description", ""), "parent": header.get("parentCommit")}
        page, answer = call.page(repo.id, repo.type), {"success": True, "hookOutput": ""}
        with repo.lock:  # so that no other pull request takes the number
            if "create_pr" in call.query:
                number = len(repo.named("refs/pr/")) + 1
                options["new_ref"] = f"refs/pr/{number}"
                answer |= {"pullRequestUrl": f"{page}/discussions/{number}", "pullRequestNum": number}
            commit = repo.commit(revision, changes, header["summary"], author=call.user.name, **options)
        return {**answer, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}

    def squash(self, call: Call, branch: str):
        call.repo.squash(branch, call.json["message"], call.user.name)
        return {}

    def list_lfs(self, call: Call):
        entries = {}
        for ref in list(call.repo.refs):
            for commit in reversed(call.repo.commits(ref)):
                for path, file in commit.files.items():
                    if file.sha256 in call.repo.objects:
                        entry = {"fileOid": file.sha256, "oid": file.sha256, "size": file.size, "filename": path}
                        entries.setdefault(file.sha256, {**entry, "pushedAt": commit.date, "ref": ref})
        return list(entries.values())

    def delete_lfs(self, call: Call):
        deletions = call.json["deletions"]
        call.repo.delete_objects(set(deletions["sha"]), deletions["rewriteHistory"])
        return {}

    def lfs_batch(self, call: Call):
        repo, answers = call.repo, []
        for asked in call.json["objects"]:
            href = f"{call.request.base_url}lfs/{repo.type}s/{repo.id}/{asked['oid']}"
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.objects:  # no actions tell the client that there is nothing to upload
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def put_object(self, call: Call, oid: str):
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, f"The content is not that of {oid}")
        call.repo.objects[oid] = call.body
        return Response(headers={"ETag": f'"{oid}"'})

    def get_object(self, call: Call, oid: str):
        return _content(call.request, call.repo.content(File.lfs(oid, 0)), {"ETag": f'"{oid}"'})

    def verify_object(self, call: Call, oid: str):
        if len(call.repo.content(File.lfs(oid, 0))) != call.json["size"]:
            raise HubError(400, f"{oid} has another size")
        return {}

    def resolve(self, call: Call, revision: str, path: str):
        commit = call.repo.at(revision)
        headers, file = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"], data = f'"{file.oid}"', call.repo.content(file)
        if not file.sha256:
            return _content(call.request, data, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        # another name of this machine: to the client it is another host, which must not get its token
        storage = f"http://localhost:{call.request.url.port}/lfs/{call.repo.type}s/{call.repo.id}"
        return RedirectResponse(f"{storage}/{file.sha256}", 302, headers)


class _Part(Convertor):
    """A part of a path. Routes are looked up by the quoted path, where `refs%2Fpr%2F1` is one part."""

    def __init__(self, regex: str, convert: Callable[[str], str] = unquote):
        self.regex, self.convert = regex, convert


register_url_convertor("type", _Part("models|datasets|spaces", lambda plural: plural.removesuffix("s")))
register_url_convertor("ref", _Part("tag|branch", {"tag": "tags", "branch": "heads"}.get))
register_url_convertor("repo", _Part("[^/]+/[^/]+"))
register_url_convertor("part", _Part("[^/]+"))
register_url_convertor("rest", _Part(".+"))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _is_lfs(path: str, sample: bytes, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)


def _lfs_oids(commits: dict[str, Commit]) -> set[str]:
    return {file.sha256 for commit in commits.values() for file in commit.files.values() if file.sha256}


def _file_entry(path: str, file: File) -> dict:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {}
    return {"type": "file", "path": path, "oid": file.oid, "size": file.size, **lfs}


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _info(repo: Repo, commit: Commit, blobs: bool = False) -> dict:
    try:
        card = read_card(repo.content(commit.files["README.md"]).decode()) if "README.md" in commit.files else {}
    except ValueError:
        card = {}
    # dates, infinities and NaN of YAML are no JSON
    card = json.loads(json.dumps(card, default=str), parse_constant=lambda name: None)
    tags = [card.get("library_name"), card.get("pipeline_tag")]
    prefixes = {"tags": "", "license": "license:", "base_model": "base_model:", "datasets": "dataset:"}
    for key, prefix in prefixes.items():
        tags += [f"{prefix}{value}" for value in _listed(card, key)]
    siblings = []
    for path, file in sorted(commit.files.items()):
        details = {"size": file.size, "blobId": file.oid} if blobs else {}
        if blobs and file.sha256:
            details["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        siblings.append({"rfilename": path, **details})
    return {
        **{"_id": repo.id, "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha},
        **{"createdAt": repo.created, "lastModified": commit.date, "private": repo.private, "gated": False},
        **{"disabled": False, "downloads": 0, "likes": 0, "tags": [tag for tag in dict.fromkeys(tags) if tag]},
        **{"library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "cardData": card},
        **{"siblings": siblings, "usedStorage": sum(map(len, list(repo.objects.values())))},
    }


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """Bytes, or the range of them that was asked for."""
    headers, total = {**headers, "Accept-Ranges": "bytes"}, len(data)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Response(data, 200, headers, "application/octet-stream")
    start, stop = int(asked[1]), min(int(asked[2] or total) + 1, total)
    if start >= stop:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{total}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
    return Response(data[start:stop], 206, headers, "application/octet-stream")


class _Protocol(H11Protocol):
    """Lets the application see the connection, so that it can cut it."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


def application(hub: Hub) -> Callable:
    """The ASGI application that serves a hub, faults and all."""

    async def refuse(request: Request, error: HubError) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    async def discard(message: dict) -> None:
        pass

    handle = Starlette(routes=Api(hub).routes(), exception_handlers={HubError: refuse})

    async def serve_request(scope, receive, send) -> None:
        method, path = scope["method"], scope["raw_path"].decode()
        hub.log.append((method, path, {key.decode(): value.decode("latin-1") for key, value in scope["headers"]}))
        scope["path"] = path  # as sent: otherwise a quoted slash would separate parts
        fault = next((fault for fault in hub.faults if fault.strikes(method, path)), None)
        if fault is not None:
            await asyncio.sleep(fault.delay)
        if fault is not None and fault.before is not None:
            await run_in_threadpool(fault.before)
        if fault is None or (fault.status is None and not fault.cut):
            return await handle(scope, receive, send)
        if fault.apply:
            await handle(scope, receive, discard)
        elif fault.cut:
            await receive()  # some of the body
        else:
            await Request(scope, receive).body()  # a client that still sends might miss the answer
        if not fault.cut:
            message = "This went wrong on purpose"
            headers = {"X-Error-Message": message, **fault.headers}
            return await JSONResponse({"error": message}, fault.status, headers)(scope, receive, send)
        scope["state"]["transport"].abort()
        while (await receive())["type"] != "http.disconnect":
            pass

    return serve_request


@contextmanager
def serve(hub: Hub | None = None, port: int = 0) -> Iterator[Hub]:
    """Serves a hub on 127.0.0.1, in a thread.

    Args:
        hub (`Hub`, *optional*): Hub to serve, a new one by default.
        port (`int`): Port; 0 takes any that is free.

    Yields:
        `Hub`: The hub, with its `url`.
    """
    hub = hub or Hub()
    options = {"http": _Protocol, "ws": "none", "lifespan": "off", "log_config": None, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(application(hub), **options))
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # asyncio sends at once only if it sees the protocol
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join(timeout=10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Hugging Face Hub in memory, to try things with.")
    parser.add_argument("--port", type=int, default=8765)
    with serve(port=parser.parse_args().port) as hub:
        print(f"HF_ENDPOINT={hub.url}, tokens: {', '.join(hub.users)}", flush=True)
        threading.Event().wait()
