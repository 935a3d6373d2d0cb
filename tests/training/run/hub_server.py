"""A hub of our own on loopback: the routes that huggingface_hub's client calls to send a model, and what it is to answer."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was sent, and what the next calls are answered with."""

    address: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """Repository -> whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    role: str = "write"
    """Of the token."""
    fails: dict[str, int] = field(default_factory=dict)
    """Part of a path -> the status that it is answered with; 0 cuts the connection."""
    large: int = 10_000
    """Bytes from which a file goes by way of LFS."""


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_all(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        path, hub = self.path, self.hub
        for part, status in hub.fails.items():
            if part in path:
                if not status:
                    self.close_connection = True
                    return self.connection.close()
                return self.answer({"error": "scripted"}, status)
        if path.startswith("/blob/"):
            hub.blobs[path.rpartition("/")[2]] = body
            return self.answer({})
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_right"
            return self.answer(
                {"name": "me", "type": "user", "auth": {"accessToken": {"role": hub.role}}} if known else {"error": "no"},
                200 if known else 401,
            )
        if path == "/api/repos/create":
            given = json.loads(body)
            name = given["name"] if not given.get("organization") else f"{given['organization']}/{given['name']}"
            name = name if "/" in name else f"me/{name}"
            if name in hub.repos:
                return self.answer({"error": "You already created this model repo", "url": f"{hub.address}/{name}"}, 409)
            private = given.get("private", given.get("visibility") == "private")
            hub.repos[name] = bool(private)
            return self.answer({"url": f"{hub.address}/{name}"})
        repo = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if "/preupload/" in path:
            ways = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= hub.large else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": ways})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.address}/blob/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self.commit(repo, body)
        if path.startswith("/api/models/"):
            if repo not in hub.repos:
                return self.answer({"error": "Repository not found"}, 404)
            return self.answer(
                {
                    "id": repo,
                    "private": hub.repos.get(repo),
                    "sha": "0" * 40,
                    "siblings": [{"rfilename": name} for name in hub.files.get(repo, {})],
                }
            )
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        return self.answer({"error": f"no such route: {path}"}, 404)

    def commit(self, repo: str, body: bytes) -> None:
        if repo not in self.hub.repos:
            return self.answer({"error": "Repository not found"}, 404)
        files = dict(self.hub.files.get(repo, {}))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "deletedFile":
                del files[value["path"]]
            if entry["key"] == "lfsFile":
                blob = self.hub.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                files[value["path"]] = blob
        self.hub.files[repo] = files
        self.hub.commits += 1
        self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.hub.address}/{repo}/commit/{'1' * 40}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_all


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
