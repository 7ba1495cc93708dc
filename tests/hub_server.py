"""A small Hub on this machine: the endpoints that huggingface_hub calls, over real HTTP, with faults on demand.

Commits are whole or not there: a branch points to a commit, a commit is a map of names to bytes. Large files come by
LFS (batch, PUT) and are known by their SHA-256, as there. Xet is not offered.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

GOOD, WRONG = "hf_" + "goodgood" * 4, "hf_" + "wrongwrong" * 3
"""A token that may do everything, and one that nobody knows."""


@dataclass
class Repo:
    """A repository: branches point to commits, commits hold files."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Adds a commit."""
        listing = "".join(f"{name} {hashlib.sha256(data).hexdigest()} " for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {listing}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class Hub(ThreadingHTTPServer):
    """The server.

    `faults` holds what is to go wrong: "lfs" cuts uploads in the middle, "commit" cuts before a commit is made,
    "answer" after it, "down" cuts everything. `seen` lists the requests as "METHOD path".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: set[str] = set()
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> str:
        """Puts files into a repository directly; returns the commit."""
        return self.repos.setdefault(repo, Repo(private)).commit(branch, files)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that are cut on purpose are no news."""


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A Hub, while it is needed."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        if "down" in self.server.faults:
            return self._cut()
        routes = (
            (r"GET /api/whoami-v2", self._whoami),
            (r"POST /api/validate-yaml", self._validate),
            (r"POST /api/repos/create", self._create),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"PUT /lfs/([0-9a-f]{64})", self._upload),
            (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        )
        for pattern, answer in routes:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(*found.groups())
        return self._fail(404, "EntryNotFound", "no such endpoint")

    # ---- answers ----

    def _whoami(self) -> None:
        self._json({"name": "someone", "type": "user", "orgs": []}) if self._known() else self._refuse()

    def _validate(self) -> None:
        text = json.loads(self._body())["content"]
        good = text.startswith("---\n") and "\nlicense:" in text.split("\n---\n")[0]
        errors = [] if good else [{"message": '"license" is required'}]
        self._json({"errors": errors, "warnings": []}, 200 if good else 400)

    def _create(self) -> None:
        body = json.loads(self._body())
        name = f"{body['organization']}/{body['name']}"
        if not self._known():
            return self._refuse()
        if name in self.server.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        self.server.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=_private(body))
        return self._json({"url": f"{self.server.url}/{name}", "id": "1"})

    def _info(self, name: str, revision: str | None) -> None:
        if (found := self._find(name, revision or "main")) is None:
            return None
        repo, sha = found
        siblings = [{"rfilename": file} for file in sorted(repo.commits[sha])]
        return self._json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if (found := self._find(name, revision)) is None:
            return None
        entries = []
        for file, data in sorted(found[0].commits[found[1]].items()):
            entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": _git(data)}
            if file.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return self._json(entries)

    def _branch(self, name: str, branch: str) -> None:
        self._body()
        if not self._known():
            return self._refuse()
        repo = self.server.repos[name]
        repo.branches.setdefault(branch, repo.branches["main"])
        return self._json({})

    def _preupload(self, name: str, revision: str) -> None:
        wanted = json.loads(self._body())["files"]
        if (found := self._find(name, revision)) is None:
            return None
        if not self._known():
            return self._refuse()
        there = found[0].commits[found[1]]
        files = []
        for file in wanted:
            large = file["path"].endswith(".safetensors")
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in there:
                data = there[file["path"]]
                entry["oid"] = hashlib.sha256(data).hexdigest() if large else _git(data)
            files.append(entry)
        return self._json({"files": files})

    def _batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self._body())["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects}) if self._known() else self._refuse()

    def _upload(self, oid: str) -> None:
        if "lfs" in self.server.faults:
            self.rfile.read(min(1024, int(self.headers["Content-Length"])))
            return self._cut()
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        return self._json({})

    def _commit(self, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        if not self._known():
            return self._refuse()
        if "commit" in self.server.faults:
            return self._cut()
        repo = self.server.repos[name]
        if lines[0]["value"].get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            return self._fail(412, "", "the branch has moved")
        files = dict(repo.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._fail(400, "", f"what is {line['key']}?")
        sha = repo.commit(branch, files)
        if "answer" in self.server.faults:
            return self._cut()
        return self._json({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def _file(self, name: str, revision: str, file: str) -> None:
        if (found := self._find(name, revision)) is None:
            return None
        data = found[0].commits[found[1]].get(file)
        if data is None:
            return self._fail(404, "EntryNotFound", "no such file")
        etag = hashlib.sha256(data).hexdigest() if file.endswith(".safetensors") else _git(data)
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": found[1]})

    # ---- what answers share ----

    def _known(self) -> bool:
        return bool(self.headers.get("Authorization") == f"Bearer {GOOD}")

    def _find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """Repository and commit; where there are none, or not for this caller, the answer was sent."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._known()):
            self._fail(404 if self._known() else 401, "RepoNotFound", "Repository not found")
            return None
        sha = repo.resolve(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, sha

    def _refuse(self) -> None:
        self._fail(401, "", "Invalid credentials in Authorization header")

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        """What came with the request, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _cut(self) -> None:
        """Ends the connection without an answer."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _private(body: dict[str, Any]) -> bool:
    """Older and newer clients say it by different keys."""
    return bool(body.get("private")) or body.get("visibility") == "private"


def _git(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that the library in this process talks to, with a good token and caches of its own; retries do not wait."""
    with running() as server:
        for name, value in settings(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server
        close_session()


def settings(server: Hub, folder: Path) -> dict[str, str]:
    """The environment of a process that talks to a Hub, with caches below a folder."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": GOOD,
        "MMSPEC_CACHE": str(folder / "cache"),
    }
