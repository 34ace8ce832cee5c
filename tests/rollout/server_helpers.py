"""Fake vLLM servers in processes of their own, and ranks that are threads of one process."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from opdengine.distributed import Ranks
from opdengine.rollout.vllm.http_client import JSONClient
from opdengine.types import Request, SamplingParams

SCRIPT = Path(__file__).with_name("fake_server.py")
PARAMS = SamplingParams(max_tokens=4, n=2, seed=3)
WAIT_SECONDS = 300
"""A rank may start a server before it meets the others, and that takes long on a busy machine."""
REQUESTS = [Request(f"p{i}", (5, 6, 7 + i), seed=i) for i in range(3)]

T = TypeVar("T")


class Server:
    """A fake server in a process of its own."""

    def __init__(self, description: Path, port: int = 0) -> None:
        command = [sys.executable, str(SCRIPT), str(description), str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any) -> Any:
        """From any thread."""
        return JSONClient(self.url).call(path, body)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def ids(rows: list[list[Any]]) -> list[list[int]]:
    """Token ids of all completions."""
    return [c.token_ids.tolist() for row in rows for c in row]


def settings(models: dict[str, str], prompt_file: str, folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    """A run on a fake server."""
    return {
        "model": models["student"],
        "teachers": [{"model": models["big"]}],
        "train_data": [prompt_file],
        "output_dir": str(folder),
        "method": "opd",
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": url,
        "max_logprob_difference": 100.0,  # the samples are made up
        **changes,
    }


@dataclass
class Board:
    """Where the ranks leave their values."""

    size: int
    values: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [b""] * self.size
        self.barrier = threading.Barrier(self.size)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread; one that waits for the others in vain fails."""

    board: Board = field(default_factory=lambda: Board(1))

    def gather(self, value: T) -> list[T]:
        self.board.values[self.rank] = pickle.dumps(value)
        self.board.barrier.wait(WAIT_SECONDS)
        values = [pickle.loads(data) for data in self.board.values]
        self.board.barrier.wait(WAIT_SECONDS)
        return values


def on_ranks(count: int, work: Callable[[ThreadRanks], T]) -> list[T | BaseException]:
    """What every rank returned or raised."""
    board = Board(count)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, ThreadRanks(rank, count, rank, count, board)) for rank in range(count)]
    return [future.exception() or future.result() for future in futures]
