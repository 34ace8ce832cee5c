"""What the tests of exact teachers elsewhere share: real servers in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.config.sections import TeacherConfig
from opdengine.models.chat import load_tokenizer
from opdengine.teachers.remote import RemoteTeacher
from opdengine.teachers.serve import server_of
from opdengine.teachers.served_model import Reply, Served
from opdengine.types import TeacherContext

ROOT = Path(__file__).parents[2]


@dataclass
class TeacherServer:
    """``opdengine teacher-serve`` on loopback."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def teacher_serve(model: str, *arguments: str, port: int = 0, **environment: str) -> Iterator[TeacherServer]:
    """A server of a model folder."""
    places = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    process = subprocess.Popen(
        [sys.executable, "-m", "opdengine", "teacher-serve", "--model", model, "--port", str(port), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    server = TeacherServer(process, process.stdout.readline().partition(" ")[0])
    try:
        assert server.url.startswith("http://127.0.0.1:")
        yield server
    finally:
        server.stop()
        process.stdout.close()


def remote(model: str, *urls: str, stop: bool = True, **settings: Any) -> RemoteTeacher:
    """A teacher behind servers that does not wait long before it tries again."""
    config = TeacherConfig(
        **{"model": model, "name": "t", "hidden_states_url": list(urls), "timeout": 20.0, "max_retries": 2, **settings}
    )
    teacher = RemoteTeacher(config, load_tokenizer(config.tokenizer or model), stop_on_failure=stop)
    teacher.pool.backoff = 0.01
    return teacher


@contextmanager
def answering(served: Served, token: str | None = None, port: int = 0) -> Iterator[str]:
    """A server in a thread of this process, whose model a test may spoil; yields its address."""
    with server_of(served, "127.0.0.1", port, token) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def contexts(count: int = 5) -> list[TeacherContext]:
    """What a teacher judges, of several lengths."""
    found = []
    for n in range(count):
        ids = np.random.default_rng(n).integers(0, 250, 20 + n)
        found.append(TeacherContext(f"s{n}", "t", ids, np.arange(8 + n, len(ids))))
    return found


class Spoiled:
    """A model that answers as another does, but for what a test changes.

    Args:
        served: the model.
        score: (answer of the model) -> what is answered.
    """

    def __init__(self, served: Served, score: Callable[[Reply], Reply], **fields: Any) -> None:
        self._served, self._score = served, score
        self.asked = 0
        for name, value in fields.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served, name)

    def score(self, *arguments: Any) -> Reply:
        self.asked += 1
        return self._score(self._served.score(*arguments))


def plain(reply: Reply) -> Reply:
    return reply
