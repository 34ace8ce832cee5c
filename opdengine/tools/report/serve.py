"""``opdengine report --watch``: the page on a loopback address, made anew when a run has gone on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opdengine.errors import ConfigError
from opdengine.tools.report import render

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"


@dataclass
class Watched:
    """The page of some runs, as new as their files.

    Args:
        folders: of the runs.
    """

    folders: Sequence[Path]
    _made: tuple[str, bytes] = ("", b"")
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stamp(self) -> str:
        """Changes when a step of any run is logged, or a run ends."""
        files = [folder / name for folder in self.folders for name in ("metrics.jsonl", "final")]
        return " ".join(f"{file.stat().st_mtime_ns}" for file in files if file.exists())

    def page(self) -> bytes:
        """The page; two requests at once make it once."""
        with self._lock:
            stamp = self.stamp()
            if self._made[0] != stamp:
                self._made = (stamp, render(self.folders, watch=True))
            return self._made[1]


class Handler(BaseHTTPRequestHandler):
    """Answers ``/`` and ``/stamp``, to a browser on this machine only.

    Args:
        watched: the page.
        given: of the base class.
    """

    def __init__(self, watched: Watched, *given: Any) -> None:
        self.watched = watched
        super().__init__(*given)

    def do_GET(self) -> None:
        """The page, or its stamp; a name other than this machine's is refused (a page elsewhere could use one)."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(403)
        elif self.path == "/":
            self._answer("text/html; charset=utf-8", self.watched.page())
        elif self.path == "/stamp":
            self._answer("text/plain", self.watched.stamp().encode())
        else:
            self.send_error(404)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""


def server_of(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the page, on a loopback address; ``serve_forever`` starts it.

    Args:
        folders: of the runs.
        port: 0 takes a free one.

    Raises:
        ConfigError: a folder holds no run, or the port is taken.
    """
    watched = Watched(folders)
    watched.page()
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, watched))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port} is not possible ({error}); choose another, or 0 for a free one") from None
