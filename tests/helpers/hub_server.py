"""A stand-in for the Hub's API: repositories in memory with branches, downloads, LFS uploads and commits; it counts requests."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = 1024  # bytes from which a file goes by LFS, as do all safetensors

# A small repository, what of it is read, and a token.
SECRET = "hf_a_token_of_this_test"
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": b"weights" * 400,
    "tokenizer.model": b"pieces",
    "vocab.txt": b"words",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "weights.pt": b"pickle",
    "state.pkl": b"pickle",
    "modeling.py": b"import os",
    "consolidated.safetensors": b"again" * 400,
    "onnx/model.json": b"{}",
    "original/model.safetensors": b"other" * 400,
    "README.md": b"card",
}
READ = {"config.json", "model.safetensors", "tokenizer.model", "vocab.txt", "chat_template.jinja"}


@dataclass
class Repository:
    """A repository: the files of each commit, and the commit of each branch and tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit that has these files beside the branch's, and move the branch to it; return its hash."""
        all_files = self.commits.get(self.branches.get(branch, ""), {}) | files
        text = json.dumps([len(self.commits), branch, sorted(all_files)])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = all_files
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> str | None:
        """Return the commit of a revision."""
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Hub:
    """The running stand-in.

    Attributes:
        models, datasets: repositories by name.
        requests: (method, path) in order of arrival.
        tokens: the Authorization header of each request, None without one.
        fail: gets method and path of a request; returns a status to answer with, "cut" to close the connection in the middle of
            the body, or None.
        token: that all requests need; None: none does.
        objects: LFS objects by SHA-256.
    """

    url: str = ""
    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    fail: Callable[[str, str], int | str | None] = lambda method, path: None
    token: str | None = None
    objects: dict[str, bytes] = field(default_factory=dict)

    def paths(self, method: str, part: str = "") -> list[str]:
        """Return the paths of the requests of a method that contain a text."""
        return [path for of, path in self.requests if of == method and part in path]


def is_large(path: str, data: bytes) -> bool:
    """Return whether a file is stored by LFS."""
    return path.endswith(".safetensors") or len(data) >= LARGE


def git_hash(data: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid(path: str, data: bytes) -> str:
    """Return the hash that the Hub compares a file by."""
    return hashlib.sha256(data).hexdigest() if is_large(path, data) else git_hash(data)


def use_hub(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Make huggingface_hub in this process use the stand-in, and a cache in `home`."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has LFS alone
    with suppress(ImportError):  # older versions don't ask who calls
        from huggingface_hub.utils import _detect_agent

        monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}}, raising=False)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run the stand-in while the body runs."""
    hub, lock = Hub(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            path = unquote(urlsplit(self.path).path)
            size = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self.chunk, b""))
                self.rfile.readline()
            else:
                body = self.rfile.read(size)
            with lock:
                hub.requests.append((self.command, path))
                hub.tokens.append(self.headers.get("Authorization"))
                how = hub.fail(self.command, path)
            if isinstance(how, int):
                # A server may quote what it was sent.
                return self.reply({"error": f"refused: {self.headers.get('Authorization')}"}, how)
            if (
                hub.token is not None
                and self.headers.get("Authorization") != f"Bearer {hub.token}"
                and "/lfs/" not in path
            ):
                return self.reply({"error": "Invalid credentials"}, 401)
            with lock:
                self.answer(path, body, how == "cut")

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            if data:
                self.rfile.readline()
            return data

        def answer(self, path: str, body: bytes, cut: bool) -> None:
            parts = path.strip("/").split("/")
            if parts[:1] == ["lfs"]:
                hub.objects[parts[1]] = body
                return self.reply({})
            if path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            api = parts[0] == "api"
            parts = parts[1:] if api else parts
            of = hub.models
            if parts[0] in ("datasets", "models"):
                of = hub.datasets if parts[0] == "datasets" else hub.models
                parts = parts[1:]
            name, rest = "/".join(parts[:2]), parts[2:]
            if name.endswith(".git") and rest == ["info", "lfs", "objects", "batch"]:
                return self.lfs_batch(json.loads(body))
            repository = of.get(name)
            if repository is None:
                return self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if not api:
                return self.resolve(repository, rest[1], "/".join(rest[2:]), cut)
            action, rest = (rest[0], rest[1:]) if rest else ("revision", ["main"])
            revision = "/".join(rest[:1])
            if action == "branch":
                if revision in repository.branches:
                    return self.reply({"error": "exists"}, 409)
                repository.branches[revision] = repository.branches["main"]
                return self.reply({})
            commit = repository.at("/".join(rest)) or repository.at(revision)
            if commit is None:
                return self.reply({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = repository.commits[commit]
            if action == "revision":
                info = {"id": name, "sha": commit, "private": repository.private, "siblings": [], "tags": []}
                return self.reply(info | {"downloads": 0, "likes": 0})
            if action == "tree":
                return self.reply([self.entry(file, data) for file, data in files.items()])
            if action == "preupload":
                return self.preupload(json.loads(body), files)
            assert action == "commit", path
            self.commit(repository, f"{hub.url}/{name}", revision, body)

        def entry(self, file: str, data: bytes) -> dict[str, Any]:
            entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": git_hash(data)}
            if is_large(file, data):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            return entry

        def create(self, body: dict[str, Any]) -> None:
            name = f"{body['organization']}/{body['name']}"
            if name in hub.models:
                return self.reply({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            private = body.get("visibility") == "private" or bool(body.get("private"))
            hub.models[name] = Repository(private=private)
            hub.models[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.reply({"url": f"{hub.url}/{name}", "name": name, "id": name})

        def preupload(self, body: dict[str, Any], files: dict[str, bytes]) -> None:
            modes = []
            for each in body["files"]:
                path = each["path"]
                large = path.endswith(".safetensors") or each["size"] >= LARGE
                row = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                modes.append(row | ({"oid": oid(path, files[path])} if path in files else {}))
            self.reply({"files": modes})

        def lfs_batch(self, body: dict[str, Any]) -> None:
            rows = []
            for each in body["objects"]:
                row = {"oid": each["oid"], "size": each["size"]}
                if each["oid"] not in hub.objects:
                    row["actions"] = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}", "header": {}}}
                rows.append(row)
            self.reply({"transfer": "basic", "objects": rows})

        def commit(self, repository: Repository, address: str, branch: str, body: bytes) -> None:
            files = {}
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            commit = repository.commit(files, branch)
            self.reply({"commitUrl": f"{address}/commit/{commit}", "commitOid": commit, "success": True})

        def resolve(self, repository: Repository, revision: str, file: str, cut: bool) -> None:
            commit = repository.at(revision)
            files = {} if commit is None else repository.commits[commit]
            if file not in files:
                return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            data = files[file]
            headers = {"ETag": f'"{oid(file, data)}"', "X-Repo-Commit": str(commit), "Accept-Ranges": "bytes"}
            start = 0
            if span := self.headers.get("Range"):
                start = int(span.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send_response(206 if span else 200)
            for key, value in (headers | {"Content-Length": str(len(data) - start)}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(data[start : start + (len(data) - start) // 2] if cut else data[start:])
            if cut:
                self.close_connection = True

        def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            for key, text in (
                {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
            ).items():
                self.send_header(key, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
