"""Speaks the protocol of a vLLM server without a model: ``python fake_server.py DESCRIPTION.json PORT|SOCKET``.

Samples are made up from the seed. ``POST /fault {"kind": ..., "after": n}`` lets every generation after
the next ``n`` fail: "500", "garbage", "half", "fields", "hang", "die" or "none"; "restart" forgets the
weights once, as a new server would; "cache" does not reset the cache after a policy of this ``version``.
"""

from __future__ import annotations

import json
import os
import random
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DESCRIPTION = json.loads(Path(sys.argv[1]).read_text())
STATE: dict[str, Any] = {"version": "default", "policy": None, "loaded": 0, "calls": 0, "fault": "none", "after": 0}
LOADING = threading.Lock()


def keys_of(path: str) -> set[str]:
    """Names of the tensors in a safetensors file."""
    with open(path, "rb") as file:
        return set(json.loads(file.read(int.from_bytes(file.read(8), "little")))) - {"__metadata__"}


def sample(body: dict[str, Any]) -> dict[str, Any]:
    params = body["sampling_params"]
    rng = random.Random(params["seed"])
    ids = [rng.randrange(5, 200) for _ in range(params["max_tokens"])]
    return {
        "index": 0,
        "finish_reason": "length",
        "token_ids": ids,
        "weight_versions": [{"version": STATE["version"], "start": 0, "end": len(ids)}],
        "logprobs": {"content": [{"token_id": i, "logprob": -5.5} for i in ids]},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path in ("/weight_info", "/health")
        self.reply(200, json.dumps({"weight_version": STATE["version"]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer: Any = {}
        if self.path == "/fault":
            STATE["fault"], STATE["after"], STATE["at"] = body["kind"], body.get("after", 0), body.get("version")
        elif self.path == "/state":
            answer = STATE
        elif self.path == "/collective_rpc" and body["method"] == "describe_engine":
            answer = {"results": [DESCRIPTION]}
        elif self.path == "/collective_rpc":
            if body["args"]:
                path, names, low_rank = body["args"]
                assert keys_of(path) == set(names.values())
                STATE["low_rank"] = [] if low_rank is None else sorted(keys_of(low_rank))
            with LOADING:
                if not body["args"] or STATE["policy"] != body["args"]:
                    STATE["loaded"] += 1
                STATE["policy"] = body["args"]
        elif self.path.startswith("/reset_prefix_cache?"):
            arrived = Path(STATE["policy"][0]).name if STATE["policy"] else ""
            answer = {"success": STATE["fault"] != "cache" or not arrived.startswith(f"policy-{STATE['at']}-")}
        elif self.path == "/update_weight_version":
            STATE["version"] = body["new_version"]
        elif self.path == "/inference/v1/generate":
            STATE["calls"] += 1
            STATE["after"] -= 1
            kind = STATE["fault"] if STATE["after"] < 0 else "none"
            if kind == "restart":
                STATE["version"], STATE["policy"], STATE["fault"] = "default", None, "none"
            if kind == "die":
                os._exit(1)
            if kind == "hang":
                time.sleep(600)
            if kind == "500":
                return self.reply(500, b'{"error": {"message": "EngineCore encountered an issue"}}')
            if kind == "garbage":
                return self.reply(200, b"<html>this is a login page</html>")
            answer = {"choices": [sample(body)]}
            if kind == "fields":
                del answer["choices"][0]["logprobs"]
            if kind == "half":
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return None
        return self.reply(200, json.dumps(answer).encode())

    def reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class SocketServer(ThreadingHTTPServer):
    """On a socket in the file system."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        return self.socket.accept()[0], ("", 0)


if __name__ == "__main__":
    if sys.argv[2].isdigit():
        server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
        print(server.server_port, flush=True)
    else:
        server = SocketServer(sys.argv[2], Handler)  # type: ignore[arg-type]
    server.daemon_threads = True
    server.serve_forever()
