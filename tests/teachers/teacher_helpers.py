"""What the tests of teachers share: server processes, configurations, references."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.config.train import TeacherConfig
from opdengine.teachers.server import ServedTeacher
from opdengine.types import TeacherContext

SCRIPT = Path(__file__).with_name("teacher_server.py")


@dataclass
class Server:
    """A server process on loopback."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def control(self, **settings: Any) -> None:
        """Replace all settings and start counting anew."""
        data = json.dumps(settings).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/control", data) as answer:
            answer.read()

    @property
    def seen(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/control") as answer:
            return dict(json.load(answer))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serve(model: str | int, port: int = 0) -> Iterator[Server]:
    """A server for a model folder, or for a table of bigrams over so many ids."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(model), str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    server = Server(process, int(process.stdout.readline()))
    try:
        yield server
    finally:
        server.stop()


def served(server: Server, tokenizer: Any, *, stop: bool = False, k: int = 8, **settings: Any) -> ServedTeacher:
    """A teacher behind the server that does not wait long before it tries again."""
    defaults = {"name": "served", "timeout": 20.0, "max_retries": 2, "score_top_k": k}
    config = TeacherConfig("tiny", base_url=server.url, **{**defaults, **settings})
    teacher = ServedTeacher(config, tokenizer, len(tokenizer), stop_on_failure=stop)
    teacher.endpoint.backoff = 0.01
    return teacher


def context(ids: list[int], targets: int, name: str = "served") -> TeacherContext:
    """The last ``targets`` ids are to be judged."""
    return TeacherContext("r", name, np.array(ids), np.arange(len(ids) - targets, len(ids)))
