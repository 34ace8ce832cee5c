"""A local stand-in of the Hugging Face hub: logins, repositories, and commits of files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34


@dataclass
class Hub:
    """What the hub holds.

    Args:
        url: its address.
        repositories: name -> {"private": bool, "files": {path: bytes}, "commits": [message]}.
        is_full: refuse every commit.
        asked: methods and paths of all requests.
    """

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_full: bool = False
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, private: bool = False) -> None:
        self.repositories[name] = {"private": private, "files": {}, "commits": []}


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serve a hub with the user "alice" on a free port of this machine; "acme/theirs" is another owner's."""
    hub = Hub()
    hub.add("acme/theirs")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """No lines between those of the tests."""

        def answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            self.answer(*respond(hub, self.headers.get("Authorization", ""), self.command, path, body))

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def respond(hub: Hub, authorization: str, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer."""
    token = authorization.removeprefix("Bearer ")
    if token not in (TOKEN, READ_TOKEN):
        return 401, {"error": "Invalid user token."}
    if path == "/api/whoami-v2":
        return 200, {"name": "alice", "type": "user", "orgs": []}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'alice'}/{wanted['name']}"
        if name in hub.repositories:
            return 409, {"error": "exists", "url": f"{hub.url}/{name}"}
        if token == READ_TOKEN or not name.startswith("alice/"):
            return 403, {"error": f"You don't have the rights to create a model under the namespace {name}"}
        hub.add(name, wanted.get("visibility") == "private")
        return 200, {"url": f"{hub.url}/{name}"}
    owner, name, *rest = path.removeprefix("/api/models/").split("/")
    repository = f"{owner}/{name}"
    found = hub.repositories.get(repository)
    if found is None:
        return 404, {"error": "Repository not found"}
    if not rest or rest[0] == "revision":
        told = {"id": repository, "modelId": repository, "private": found["private"], "sha": "0" * 40, "tags": []}
        return 200, told | {"siblings": [{"rfilename": path} for path in found["files"]]}
    if token == READ_TOKEN or owner != "alice":
        return 403, {"error": "Forbidden: you do not have write access"}
    if rest[0] == "auth-check":
        return 200, {}
    if rest[0] == "preupload":  # large files would go to a storage of their own
        files = json.loads(body)["files"]
        return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
    if rest[0] == "commit" and not hub.is_full:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                found["commits"].append(line["value"]["summary"])
            elif line["key"] == "file":
                found["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/{repository}/commit/{'1' * 40}"}
    return (403 if rest[0] == "commit" else 404), {"error": "storage is full" if hub.is_full else "no such page"}
