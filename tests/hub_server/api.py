"""The routes of the Hub API."""

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from .cards import check_card, listed, read_card
from .hub import Hub, User, is_lfs
from .repo import Commit, File, HubError, Repo


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
            ("GET", repo + "/xet-{kind:part}-token/{revision:part}", self.xet_token, "read"),
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
            mode = "lfs" if is_lfs(path, base64.b64decode(new["sample"]), new["size"]) else "regular"
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

    def xet_token(self, call: Call, kind: str, revision: str):
        if self.hub.xet_storage is None:
            raise HubError(404, "Not Found")
        if kind == "write":
            self._check_writer(call, call.repo.id.split("/")[0])
        answer = {"accessToken": "xet", "exp": 2**31, "casUrl": self.hub.xet_storage}
        names = {"X-Xet-Access-Token": "accessToken", "X-Xet-Token-Expiration": "exp", "X-Xet-Cas-Url": "casUrl"}
        return JSONResponse(answer, headers={name: str(answer[key]) for name, key in names.items()})

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
        if call.repo.id in self.hub.gated:
            raise HubError(403 if call.user else 401, f"Access to model {call.repo.id} is restricted.", "GatedRepo")
        commit = call.repo.at(revision)
        headers, file = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"], data = f'"{file.oid}"', call.repo.content(file)
        if not file.sha256:
            return _content(call.request, data, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if self.hub.xet_storage is not None:
            refresh = f"{call.request.base_url}api/{call.repo.type}s/{call.repo.id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": file.sha256, "X-Xet-Refresh-Route": refresh}
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
        tags += [f"{prefix}{value}" for value in listed(card, key)]
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
