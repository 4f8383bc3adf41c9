"""A stand-in for the model hub's HTTP API, on loopback: it keeps what is pushed and serves it again.

It is no mock of this package's code: the real client of the hub talks to it over a socket, from another process, and
what is pulled are the bytes that were pushed. It has the endpoints that huggingface_hub 2.4 needs to create a
repository and a branch, to commit small files and large ones (Git LFS, one part), and to list and download a revision.
It has nothing else of the hub: no Xet storage, pull requests, tags, gates or paging, and one user with one token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["HubServer", "Repository"]

USER, TOKEN = "someone", "hf_standin"
LARGE = (".safetensors", ".onnx", ".data", ".bin")  # as the .gitattributes of a new repository has it
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()


@dataclass
class Repository:
    """Commits by id, each with all its files; branches name commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put a new commit on a branch; every commit has an id of its own."""
        text = repr((len(self.commits), self.branches.get(branch), [(name, _git_id(files[name])) for name in files]))
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit of a branch, or of its own id."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class HubServer:
    """The hub on a free port of 127.0.0.1 while the context is open.

    Attributes:
        repositories: What was pushed, by id.
        requests: Method and path of every request, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on. May be called again."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def tamper(self, repository: str, revision: str, path: str, content: bytes) -> None:
        """Change a file of a commit in place, as no honest hub would."""
        stored = self.repositories[repository]
        stored.commits[stored.resolve(revision)][path] = content

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> _Reply:
        """The reply to one request."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for wanted, pattern, endpoint in _ENDPOINTS:
                if method in wanted and (match := re.fullmatch(pattern, path)):
                    parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return endpoint(self, _Request(method, parts, token == TOKEN, body))
        raise _Refused(404, f"{method} {path} is no endpoint of this stand-in")


@dataclass
class _Request:
    method: str
    parts: dict[str, str]
    known: bool
    body: bytes

    def repository(self, hub: HubServer, write: bool = False) -> Repository:
        """The repository of the path. Strangers are told neither which exist nor which are private, as on the hub."""
        found = hub.repositories.get(self.parts["id"])
        if not self.known and (write or found is None or found.private):
            raise _Refused(401, "Invalid username or password.")
        if found is None:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return found


@dataclass
class _Reply:
    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class _Refused(Exception):  # noqa: N818 - an answer, no fault of the server
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = _Reply(json.dumps({"error": message}).encode(), status, headers)


def _json(value: Any, status: int = 200) -> _Reply:
    return _Reply(json.dumps(value).encode(), status)


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    """What identifies a file's content: the SHA-256 of a large file, Git's id of another."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else _git_id(content)


def _create(hub: HubServer, request: _Request) -> _Reply:
    wanted = json.loads(request.body)
    if not request.known:
        raise _Refused(401, "Invalid username or password.")
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    known = name in hub.repositories
    if not known:
        hub.repositories[name] = repository = Repository(wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": ATTRIBUTES})
    return _json({"url": f"{hub.url}/{name}", "id": name}, 409 if known else 200)


def _branch(hub: HubServer, request: _Request) -> _Reply:
    repository, branch = request.repository(hub, write=True), request.parts["revision"]
    if branch in repository.branches:
        raise _Refused(409, "Reference already exists")
    repository.branches[branch] = repository.resolve(json.loads(request.body).get("startingPoint", "main"))
    return _json({}, 201)


def _preupload(hub: HubServer, request: _Request) -> _Reply:
    repository = request.repository(hub, write=True)
    present = repository.commits[repository.resolve(request.parts["revision"])]
    wanted, answers = json.loads(request.body), []
    ignored = wanted.get("gitIgnore", present.get(".gitignore", b"").decode()).splitlines()
    for path in (file["path"] for file in wanted["files"]):
        ignore = any(fnmatch(path, rule) for rule in ignored)
        answer = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": ignore}
        answers.append(answer | ({"oid": _oid(path, present[path])} if path in present else {}))
    return _json({"files": answers})


def _large_batch(hub: HubServer, request: _Request) -> _Reply:
    request.repository(hub, write=True)
    answers = []
    for wanted in json.loads(request.body)["objects"]:
        href = f"{hub.url}/{request.parts['id']}.git/large/{wanted['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        answers.append(wanted if wanted["oid"] in hub.large else wanted | {"actions": actions})
    return _json({"transfer": "basic", "objects": answers})


def _large_put(hub: HubServer, request: _Request) -> _Reply:
    if hashlib.sha256(request.body).hexdigest() != request.parts["oid"]:
        raise _Refused(400, "The content has another SHA-256")
    hub.large[request.parts["oid"]] = request.body
    return _json({})


def _large_verify(hub: HubServer, request: _Request) -> _Reply:
    request.repository(hub, write=True)
    if len(hub.large.get(request.parts["oid"], b"")) != json.loads(request.body)["size"]:
        raise _Refused(404, "The object has not been uploaded")
    return _json({})


def _commit(hub: HubServer, request: _Request) -> _Reply:
    repository, branch = request.repository(hub, write=True), request.parts["revision"]
    if branch not in repository.branches:
        raise _Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    files = dict(repository.commits[repository.branches[branch]])
    for line in map(json.loads, request.body.splitlines()):
        value = line["value"]
        match line["key"]:
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
            case "header":
                pass
            case other:
                raise _Refused(400, f"{other} is nothing this stand-in commits")
    oid = repository.commit(branch, files)
    return _json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{request.parts['id']}/commit/{oid}"})


def _info(hub: HubServer, request: _Request) -> _Reply:
    repository = request.repository(hub)
    oid = repository.resolve(request.parts.get("revision", "main"))
    names = [{"rfilename": name} for name in sorted(repository.commits[oid])]
    return _json({"id": request.parts["id"], "sha": oid, "private": repository.private, "siblings": names})


def _tree(hub: HubServer, request: _Request) -> _Reply:
    repository = request.repository(hub)
    entries = []
    for path, content in sorted(repository.commits[repository.resolve(request.parts["revision"])].items()):
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_id(content)}
        large = {"lfs": {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}}
        entries.append(entry | (large if path.endswith(LARGE) else {}))
    return _json(entries)


def _file(hub: HubServer, request: _Request) -> _Reply:
    repository, path = request.repository(hub), request.parts["path"]
    commit = repository.resolve(request.parts["revision"])
    if path not in repository.commits[commit]:
        raise _Refused(404, "Entry not found", "EntryNotFound")
    content = repository.commits[commit][path]
    etag = f'"{_oid(path, content)}"'
    large = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": etag} if path.endswith(LARGE) else {}
    return _Reply(content, headers={"X-Repo-Commit": commit, "ETag": etag} | large)


_ID, _REVISION = r"(?P<id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ENDPOINTS: list[tuple[tuple[str, ...], str, Callable[[HubServer, _Request], _Reply]]] = [
    (("POST",), "/api/repos/create", _create),
    (("POST",), f"/api/models/{_ID}/branch/{_REVISION}", _branch),
    (("POST",), f"/api/models/{_ID}/preupload/{_REVISION}", _preupload),
    (("POST",), f"/api/models/{_ID}/commit/{_REVISION}", _commit),
    (("GET",), f"/api/models/{_ID}(?:/revision/{_REVISION})?", _info),
    (("GET",), f"/api/models/{_ID}/tree/{_REVISION}", _tree),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", _large_batch),
    (("PUT",), rf"/{_ID}\.git/large/(?P<oid>[0-9a-f]+)", _large_put),
    (("POST",), rf"/{_ID}\.git/large/(?P<oid>[0-9a-f]+)/verify", _large_verify),
    (("HEAD", "GET"), f"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _file),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"".join(self._body())
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        try:
            reply = self.hub.answer(self.command, urlsplit(self.path).path, token, body)
        except _Refused as refused:
            reply = refused.reply
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names that the base class looks for

    def _body(self) -> Iterator[bytes]:
        """The request's body; the client sends open files in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing on stderr; the hub keeps a list."""
