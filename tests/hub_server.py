"""A small Hub on 127.0.0.1: real files in real commits, and the part of the Hub's HTTP API that `huggingface_hub` uses.

A commit is a folder that is written beside its place and then renamed, so nobody ever sees half of one. Branches point to
commits; a push is read, applied to the newest commit of its branch and published under one lock. Large files come through
the LFS protocol (`basic` transfer), others inside the commit. `cut` breaks downloads off in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"
LARGE = ".safetensors"


class HubError(Exception):
    """An answer other than 200: the Hub's code beside the status."""

    def __init__(self, status: HTTPStatus, code: str | None = None):
        super().__init__(code or status.phrase)
        self.status, self.code = status, code


NOT_FOUND = HTTPStatus.NOT_FOUND


class Store:
    """Repositories in a folder: `NAME/commits/SHA/files`, branches and privacy in memory."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        (folder / "lfs").mkdir(parents=True)

    def create(self, name: str, private: bool) -> None:
        with self.lock:
            if name in self.branches:
                raise HubError(HTTPStatus.CONFLICT)
            self.branches[name] = {"main": self._commit(name, None, {}, [])}
            self.private |= {name} if private else set()

    def branch(self, name: str, branch: str) -> None:
        with self.lock:
            if branch in self.branches[name]:
                raise HubError(HTTPStatus.CONFLICT)
            self.branches[name][branch] = self.branches[name]["main"]

    def check(self, name: str, token: str | None) -> None:
        """A private repository looks to strangers as if it were not there."""
        if name not in self.branches or (name in self.private and token != TOKEN):
            raise HubError(HTTPStatus.UNAUTHORIZED if token is None else NOT_FOUND, "RepoNotFound")

    def resolve(self, name: str, revision: str) -> tuple[str, Path]:
        """The commit of a branch or a commit's name, and its folder."""
        sha = self.branches[name].get(revision, revision)
        folder = self.folder / name / "commits" / sha
        if not folder.is_dir():
            raise HubError(NOT_FOUND, "RevisionNotFound")
        return sha, folder

    def push(self, name: str, branch: str, lines: list[dict[str, Any]]) -> str:
        """Apply the lines of a commit to a branch."""
        files, deleted, parent = {}, [], None
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                parent = value.get("parentCommit")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = (self.folder / "lfs" / value["oid"]).read_bytes()
            else:
                deleted.append(value["path"])
        with self.lock:
            newest = self.branches[name][branch]
            if parent not in (None, newest):
                raise HubError(HTTPStatus.PRECONDITION_FAILED)
            self.branches[name][branch] = self._commit(name, newest, files, deleted)
            return self.branches[name][branch]

    def _commit(self, name: str, parent: str | None, files: dict[str, bytes], deleted: list[str]) -> str:
        content = json.dumps([parent, sorted((path, digest(data)) for path, data in files.items()), deleted])
        sha = hashlib.sha1(content.encode()).hexdigest()
        commits = self.folder / name / "commits"
        draft, place = commits / f".{sha}", commits / sha
        draft.mkdir(parents=True)
        if parent is not None:
            shutil.copytree(commits / parent, draft, dirs_exist_ok=True)
        for path in deleted:
            (draft / path).unlink()
        for path, data in files.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_bytes(data)
        draft.rename(place) if not place.exists() else shutil.rmtree(draft)
        return sha


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    """Routes requests to the store; `ROUTES` maps a method and a pattern to a method of this class."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server.requests.append((method, path, self.headers.get("Range")))
        try:
            for name, pattern in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and name.split("_")[0] == method:
                    getattr(self, name)(**match.groupdict())
                    return
            raise HubError(NOT_FOUND)
        except HubError as error:
            self.send({"error": str(error)}, error.status, {"X-Error-Code": error.code} if error.code else {})

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def send(self, content: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(data),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def checked(self, name: str, *, write: bool = False) -> Store:
        if write and self.token != TOKEN:
            raise HubError(HTTPStatus.FORBIDDEN if self.token else HTTPStatus.UNAUTHORIZED)
        self.server.store.check(name, self.token)
        return self.server.store

    def GET_file(self, name: str, revision: str, path: str) -> None:
        sha, folder = self.checked(name).resolve(name, revision)
        if not (folder / path).is_file():
            raise HubError(NOT_FOUND, "EntryNotFound")
        data = (folder / path).read_bytes()
        tag, start = digest(data), 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and int(asked[1]) < len(data):
            start = int(asked[1])
        part = data[start : int(asked[2]) + 1 if asked and asked[2] else None]
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        fields = {"X-Repo-Commit": sha, "ETag": f'"{tag}"', "X-Linked-Etag": f'"{tag}"', "X-Linked-Size": len(data)}
        fields |= {"Accept-Ranges": "bytes", "Content-Length": len(part)}
        if asked:
            fields["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        for key, value in fields.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut.get(path, [])
        if cut:
            part = part[: cut.pop(0)]
            self.close_connection = True
        self.wfile.write(part)

    def GET_info(self, name: str, revision: str | None = None) -> None:
        sha, folder = self.checked(name).resolve(name, revision or "main")
        siblings = [{"rfilename": path} for path in listing(folder)]
        private = name in self.server.store.private
        self.send({"id": name, "modelId": name, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def GET_tree(self, name: str, revision: str) -> None:
        _, folder = self.checked(name).resolve(name, revision)
        files = {path: (folder / path).read_bytes() for path in listing(folder)}
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": digest(data)} for path, data in files.items()
        ]
        self.send(entries)

    def GET_whoami(self) -> None:
        if self.token != TOKEN:
            raise HubError(HTTPStatus.UNAUTHORIZED)
        self.send({"name": "owner", "type": "user", "orgs": []})

    def POST_create(self) -> None:
        fields = json.loads(self.body)
        if self.token != TOKEN:
            raise HubError(HTTPStatus.UNAUTHORIZED)
        name = f"{fields.get('organization') or 'owner'}/{fields['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        try:
            self.server.store.create(name, fields.get("visibility") == "private" or fields.get("private", False))
        except HubError as error:
            self.send({"error": "You already created this model repo", **url}, error.status)
        else:
            self.send(url)

    def POST_branch(self, name: str, branch: str) -> None:
        self.checked(name, write=True).branch(name, branch)
        self.send({})

    def POST_yaml(self) -> None:
        self.send({"errors": [], "warnings": []})

    def POST_preupload(self, name: str, revision: str) -> None:
        self.checked(name, write=True).resolve(name, revision)
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in files}
        self.send(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
        )

    def POST_lfs(self, name: str) -> None:
        self.checked(name, write=True)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.send({"transfer": "basic", "objects": objects})

    def PUT_lfs(self, oid: str) -> None:
        if digest(self.body) != oid:
            raise HubError(HTTPStatus.BAD_REQUEST)
        (self.server.store.folder / "lfs" / oid).write_bytes(self.body)
        self.send({})

    def POST_commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        sha = self.checked(name, write=True).push(name, revision, lines)
        url = f"{self.server.url}/{name}/commit/{sha}"
        self.send({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET_whoami", r"/api/whoami-v2"),
    ("POST_create", r"/api/repos/create"),
    ("POST_yaml", r"/api/validate-yaml"),
    ("POST_branch", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)"),
    ("POST_preupload", rf"/api/models/{_NAME}/preupload/{_REVISION}"),
    ("POST_commit", rf"/api/models/{_NAME}/commit/{_REVISION}"),
    ("GET_tree", rf"/api/models/{_NAME}/tree/{_REVISION}"),
    ("GET_info", rf"/api/models/{_NAME}/revision/{_REVISION}"),
    ("GET_info", rf"/api/models/{_NAME}"),
    ("POST_lfs", rf"/{_NAME}\.git/info/lfs/objects/batch"),
    ("PUT_lfs", r"/lfs/(?P<oid>\w+)"),
    ("GET_file", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)"),
)


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        requests: (method, path, Range) of every request; HEAD counts as GET.
        cut: by path of a file, after how many bytes its next downloads are broken off.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = Store(folder)
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, list[int]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub(folder: Path) -> Iterator[HubServer]:
    """A Hub that serves while the block runs."""
    server = HubServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
