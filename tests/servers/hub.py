"""A stand-in for a Hugging Face Hub, as far as its client asks: repositories of models kept in memory.

What the client of huggingface_hub 2.4 sends to create, commit, tag, list and read; no accounts, no git.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Hub", "Repository", "run_hub"]

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    """Commits (id to files), tags and branches (name to commit)."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        digests = sorted((name, _sha1(data)) for name, data in files.items())
        facts: list[Any] = [message, len(self.commits), digests]
        oid = _sha1(json.dumps(facts).encode())
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return (
            self.branches.get(revision)
            or self.tags.get(revision)
            or (revision if revision in self.commits else None)
        )

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.resolve(revision)
        return self.commits[commit] if commit is not None else {}


@dataclass
class Hub:
    """The server's state, open to the test."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    """Method and path of a request to a status that it is answered with; None: as it should be."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the answer to its headers
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data if data is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        if (status := self.hub.refuse(self.command, path)) is not None:
            self._answer(status, {"error": "refused by the test"})
            return
        for method, pattern, do in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                do(self, body, parse_qs(parts.query), *map(unquote, match.groups()))
                return
        self._answer(404, {"error": f"the stand-in knows no {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle  # noqa: N815 - http.server's names

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        if repository.resolve(revision) is None:
            self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository.files(revision)

    # -- repositories -------------------------------------------------------------------------------

    def list_models(self, _: bytes, query: dict[str, list[str]]) -> None:
        author = query.get("author", [""])[0]
        names = [name for name in self.hub.repositories if name.startswith(f"{author}/")]
        self._answer(200, [{"id": name, "modelId": name, "private": False, "tags": []} for name in names])

    def create(self, body: bytes, _: dict[str, list[str]]) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}
        if name in self.hub.repositories:
            self._answer(409, {**url, "error": "You already created this model repo"})
            return
        made = Repository(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": b"*.bin filter=lfs\n"}, "initial commit")
        self.hub.repositories[name] = made
        self._answer(200, url)

    def info(self, _: bytes, __: dict[str, list[str]], name: str, revision: str = "main") -> None:
        files = self._files(name, revision)
        if files is not None:
            repository = self.hub.repositories[name]
            siblings = [{"rfilename": path} for path in sorted(files)]
            facts: dict[str, Any] = {
                "id": name,
                "modelId": name,
                "sha": repository.resolve(revision),
                "tags": [],
            }
            self._answer(200, {**facts, "private": repository.private, "siblings": siblings})

    def refs(self, _: bytes, __: dict[str, list[str]], name: str) -> None:
        found = self._repository(name)
        if found is not None:
            rows = {
                key: [
                    {"name": ref, "ref": f"refs/{key}/{ref}", "targetCommit": commit}
                    for ref, commit in references.items()
                ]
                for key, references in (("branches", found.branches), ("tags", found.tags))
            }
            self._answer(200, {**rows, "converts": []})

    def tag(self, body: bytes, _: dict[str, list[str]], name: str, revision: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        commit, tag = found.resolve(revision), json.loads(body)["tag"]
        if commit is None or tag in found.tags:
            self._answer(404 if commit is None else 409, {"error": "no such revision, or the tag is there"})
            return
        found.tags[tag] = commit
        self._answer(200)

    def untag(self, _: bytes, __: dict[str, list[str]], name: str, tag: str) -> None:
        found = self._repository(name)
        if found is not None:
            self._answer(200 if found.tags.pop(tag, None) else 404, {})

    # -- files --------------------------------------------------------------------------------------

    def tree(self, _: bytes, query: dict[str, list[str]], name: str, revision: str, folder: str = "") -> None:
        files = self._files(name, revision)
        if files is None:
            return
        prefix = f"{folder}/" if folder else ""
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        rows: dict[str, dict[str, Any]] = {}
        for path, data in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            first, slash, _rest = path[len(prefix) :].partition("/")
            if slash and not deep:
                rows[prefix + first] = {
                    "type": "directory",
                    "path": prefix + first,
                    "oid": "0" * 40,
                    "size": 0,
                }
            else:
                rows[path] = _row(path, data)
        if folder and not rows:
            self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(200, list(rows.values()))

    def paths_info(self, body: bytes, _: dict[str, list[str]], name: str, revision: str) -> None:
        files = self._files(name, revision)
        if files is None:
            return
        rows = []
        for path in parse_qs(body.decode()).get("paths", []):
            if path in files:
                rows.append(_row(path, files[path]))
            elif any(other.startswith(f"{path}/") for other in files):
                rows.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self._answer(200, rows)

    def resolve(self, _: bytes, __: dict[str, list[str]], name: str, revision: str, path: str) -> None:
        files = self._files(name, revision)
        if files is None:
            return
        if path not in files:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        commit = self.hub.repositories[name].resolve(revision) or ""
        headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(200, data, headers)
            return
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        piece = data[first : last + 1]
        self._answer(206, piece, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # -- commits ------------------------------------------------------------------------------------

    def preupload(self, body: bytes, _: dict[str, list[str]], name: str, revision: str) -> None:
        if self._files(name, revision) is None:
            return
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".bin", ".safetensors")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": rows})

    def lfs_batch(self, body: bytes, _: dict[str, list[str]], name: str) -> None:
        rows = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs-upload/{item['oid']}"}},
            }
            for item in json.loads(body)["objects"]
        ]
        del name
        self._answer(200, {"transfer": "basic", "objects": rows})

    def lfs_upload(self, body: bytes, _: dict[str, list[str]], oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "not the announced object"})
            return
        self.hub.objects[oid] = body
        self._answer(200)

    def commit(self, body: bytes, _: dict[str, list[str]], name: str, revision: str) -> None:
        before = self._files(name, revision)
        if before is None:
            return
        files, message = dict(before), ""
        for line in body.splitlines():
            step = json.loads(line)
            key, value = step["key"], step["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
        oid = self.hub.repositories[name].commit(revision, files, message)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()  # noqa: S324 - as git


def _row(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _sha1(data)}


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/models", _Handler.list_models),
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_NAME}/tag/([^/]+)", _Handler.tag),
    ("DELETE", rf"/api/models/{_NAME}/tag/([^/]+)", _Handler.untag),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-upload/([0-9a-f]{64})", _Handler.lfs_upload),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextlib.contextmanager
def run_hub() -> Iterator[Hub]:
    """A Hub on a free loopback port, empty."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
