"""A Hub on this machine: huggingface_hub's own client pushes to it and downloads from it, over HTTP.

It speaks the part of the Hub's protocol that models need: creating repositories and branches, uploads of ordinary and
of large files, commits, listings, downloads. No Xet storage: the client is told not to use it.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "secret"
"""Allows reading private repositories, and writing."""

LARGE = 4096
"""Files from this size on are uploaded as large ones: their content goes elsewhere before the commit names it."""


class RefusedError(Exception):
    """An answer that is an error: a status, and the Hub's code for it."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


@dataclasses.dataclass
class Repository:
    """A model repository.

    Attributes:
        private: whether reading needs TOKEN.
        gated: whether reading is refused to everybody.
        commits: commit -> file -> content.
        branches: branch -> commit.
        messages: of the commits that clients made, in order.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """What the default branch holds."""
        return self.commits[self.branches["main"]]

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Makes a commit of these files alone."""
        seed = f"{len(self.commits)} {sorted(files)}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise RefusedError(404, "RevisionNotFound")
        return oid, self.commits[oid]


class HubServer:
    """The Hub's state, and what clients did.

    Attributes:
        url: the endpoint.
        repositories: by `owner/name`.
        downloaded: files whose content was fetched, in order.
        uploaded: bytes of large files that were sent.
        requests: every request, as `METHOD /path`.
        broken: answer every request with this status, if any.
        on_commit: called before a commit is made.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.downloaded: list[str] = []
        self.uploaded: list[int] = []
        self.requests: list[str] = []
        self.broken: int | None = None
        self.on_commit = lambda: None
        self._large: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def add(self, name: str, folder: Path, **options: Any) -> Repository:
        """A repository with a folder's files."""
        repository = self.repositories[name] = Repository(**options)
        repository.commit(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        )
        return repository

    def forget(self) -> None:
        """Forgets what clients did."""
        self.downloaded.clear()
        self.uploaded.clear()
        self.requests.clear()

    # -- requests ------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            if self.broken is not None:
                raise RefusedError(self.broken, "", "the Hub is down")
            for pattern, name in _ROUTES.items():
                if found := re.fullmatch(pattern, f"{method} {path}"):
                    return getattr(self, name)(body, token, *map(unquote, found.groups()))
            raise RefusedError(404, "EntryNotFound", f"the stand-in has no {method} {path}")

    def _readable(self, name: str, token: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN):
            raise RefusedError(401, "RepoNotFound")
        if repository.gated:
            raise RefusedError(403, "GatedRepo")
        return repository

    def _writable(self, name: str, token: str | None) -> Repository:
        repository = self._readable(name, token)
        if token != TOKEN:
            raise RefusedError(403, "", "this token may not write")
        return repository

    def create(self, body: bytes, token: str | None) -> Any:
        if token != TOKEN:
            raise RefusedError(401, "", "Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {}, json.dumps({"url": f"{self.url}/{name}"}).encode()
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.repositories[name] = Repository(private=private)
        self.repositories[name].commit({".gitattributes": b""})
        return _json({"url": f"{self.url}/{name}"})

    def create_branch(self, _: bytes, token: str | None, name: str, branch: str) -> Any:
        repository = self._writable(name, token)
        if branch in repository.branches:
            raise RefusedError(409, "", "the branch exists")
        repository.branches[branch] = repository.branches["main"]
        return _json({})

    def info(self, _: bytes, token: str | None, name: str, revision: str = "main") -> Any:
        repository = self._readable(name, token)
        oid, files = repository.at(revision)
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": _git(content)} for path, content in files.items()
        ]
        return _json({"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, _: bytes, token: str | None, name: str, revision: str) -> Any:
        _, files = self._readable(name, token).at(revision)
        return _json([_described(path, content) for path, content in files.items()])

    def resolve(self, _: bytes, token: str | None, name: str, revision: str, path: str, *, send: bool = True) -> Any:
        oid, files = self._readable(name, token).at(revision)
        if path not in files:
            raise RefusedError(404, "EntryNotFound")
        if send:
            self.downloaded.append(path)
        content = files[path]
        return 200, {"ETag": f'"{_described(path, content)["etag"]}"', "X-Repo-Commit": oid}, content

    def head(self, body: bytes, token: str | None, name: str, revision: str, path: str) -> Any:
        return self.resolve(body, token, name, revision, path, send=False)

    def validate(self, body: bytes, _: str | None) -> Any:
        assert json.loads(body)["content"].startswith("---\n")
        return _json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, token: str | None, name: str, revision: str) -> Any:
        _, files = self._writable(name, token).at(revision)
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                "shouldIgnore": False,
                "oid": _described(file["path"], files[file["path"]])["etag"] if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]
        return _json({"files": answers})

    def batch(self, body: bytes, token: str | None, name: str) -> Any:
        self._writable(name, token)
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.url}/large/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self._large else wanted | {"actions": actions})
        return _json({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, _: str | None, oid: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self._large[oid] = body
        self.uploaded.append(len(body))
        return 200, {}, b""

    def commit(self, body: bytes, token: str | None, name: str, branch: str) -> Any:
        self.on_commit()
        repository = self._writable(name, token)
        files = dict(repository.at(branch)[1])
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
                if value.get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
                    raise RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        oid = repository.commit(files, branch)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})


_NAME, _PART = r"([^/]+/[^/]+)", "([^/]+)"

_ROUTES = {
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"POST /api/models/{_NAME}/branch/{_PART}": "create_branch",
    rf"GET /api/models/{_NAME}": "info",
    rf"GET /api/models/{_NAME}/revision/{_PART}": "info",
    rf"GET /api/models/{_NAME}/tree/{_PART}": "tree",
    rf"POST /api/models/{_NAME}/preupload/{_PART}": "preupload",
    rf"POST /api/models/{_NAME}/commit/{_PART}": "commit",
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": "batch",
    rf"PUT /large/{_PART}": "put",
    rf"HEAD /{_NAME}/resolve/{_PART}/(.+)": "head",
    rf"GET /{_NAME}/resolve/{_PART}/(.+)": "resolve",
}


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _described(path: str, content: bytes) -> dict[str, Any]:
    described = {"type": "file", "path": path, "size": len(content), "oid": _git(content), "etag": _git(content)}
    if len(content) >= LARGE:
        large = hashlib.sha256(content).hexdigest()
        described |= {"etag": large, "lfs": {"oid": large, "size": len(content), "pointerSize": 130}}
    return described


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[HubServer]

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        try:
            status, headers, content = self.hub.answer(self.command, urlsplit(self.path).path, body, token)
        except RefusedError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            status, content = error.status, json.dumps({"error": error.message}).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A running Hub, empty."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.hub = HubServer(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield handler.hub
        finally:
            server.shutdown()
            thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Path) -> None:
    """Points huggingface_hub at a running stand-in, with an empty cache and nobody logged in."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template[template.index("/{repo_id}") :])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
