"""A vLLM server that answers what it likes: one error in time, whatever it sends."""

from __future__ import annotations

import errno
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_http import REASONS, hostile_server, mutations

from opdengine.rollout.vllm.engine import EngineError, EngineInfo
from opdengine.rollout.vllm.http_client import GarbledError, HTTPError, JSONClient, SilentError, UnreachableError
from opdengine.rollout.vllm.opening import open_server
from opdengine.rollout.vllm.remote import ServerEngine
from opdengine.workers.printing import harmless

NO_JSON = ("huge_integer", "deep", "deep_inside", "not_utf8", "html", "gzip_bomb", "zlib_charset")
ERRORS: dict[str, type[Exception]] = {
    **dict.fromkeys(NO_JSON, GarbledError),
    **dict.fromkeys(["endless_body", "long_body", "endless_error"], GarbledError),
    **dict.fromkeys(["drip", "drip_headers", "silent", "endless_continue"], SilentError),
    **dict.fromkeys(["endless_headers", "endless_line", "no_http", "hang_up", "short"], UnreachableError),
    **dict.fromkeys(["redirect", "redirect_loop", "error_page", "key_repeated", "odd_wait"], HTTPError),
}


@pytest.mark.parametrize("kind", REASONS)
def test_every_answer_ends_in_time_and_in_one_error(kind: str) -> None:
    with hostile_server(kind) as address:
        client = JSONClient(address)
        patience = 0.5 if ERRORS.get(kind) is SilentError else 20.0
        begin = time.monotonic()
        try:
            client.call_all("/x", [{"a": 1}] * 3, patience, limit=1 << 20)
        except tuple(set(ERRORS.values())) as error:
            found: Exception | None = error
        else:
            found = None
    assert type(found) is ERRORS.get(kind, type(None))
    assert time.monotonic() - begin < 20
    said = str(found)
    assert len(said) < 1000 and harmless(said) == said


def test_a_full_queue_of_a_socket_is_waited_for(tmp_path: Path) -> None:
    """A socket in the file system refuses at once where its queue is full; a server on TCP lets one wait."""
    with socket.socket(socket.AF_UNIX) as listening, ExitStack() as waiting:
        listening.bind(str(tmp_path / "socket"))
        listening.listen(0)
        full = False
        while not full:
            first = waiting.enter_context(socket.socket(socket.AF_UNIX))
            first.setblocking(False)
            full = first.connect_ex(str(tmp_path / "socket")) == errno.EAGAIN
        client = JSONClient(f"unix:{tmp_path}/socket")
        with pytest.raises(SilentError, match=r"gave no answer in 0 s"):
            client.call("/x", timeout=0.2)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.call, "/x")
            waiting.close()  # those in the queue ask nothing
            while not (asked := _accepted(listening)):
                pass
            with asked:
                asked.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n17")
            assert answer.result() == 17


def _accepted(listening: socket.socket) -> socket.socket | None:
    """The next connection, if somebody asks in it."""
    found, _ = listening.accept()
    found.settimeout(60)
    if found.recv(1000):
        return found
    found.close()
    return None


@pytest.mark.parametrize("kind", ["drip", "endless_continue"])
def test_a_sampler_gives_up_a_server_that_never_comes_to_an_end(kind: str, tokenizer: Any) -> None:
    with hostile_server(kind) as address, pytest.raises(EngineError, match=r"hangs: .* gave no answer in 1 s"):
        open_server(address, tokenizer, response_timeout=1.0)


def engine() -> ServerEngine:
    """One that has never asked anybody."""
    made = ServerEngine("http://127.0.0.1:9")
    made._vocabulary = 300
    return made


ANSWER = {
    "choices": [
        {
            "finish_reason": "stop",
            "token_ids": [5, 6],
            "weight_versions": [{"version": "a-1"}],
            "logprobs": {"content": [{"logprob": -1.5}, {"logprob": -9999.0}]},
        }
    ]
}


def test_samples_from_any_answer() -> None:
    made = engine()
    stamps, ids, logprobs, reason = made._read(ANSWER, 4)
    assert (stamps, ids.tolist(), reason) == ({"a-1"}, [5, 6], "stop")
    np.testing.assert_array_equal(logprobs, np.float32([-1.5, np.nan]))
    for answer in mutations(ANSWER):
        try:
            _, ids, logprobs, reason = made._read(answer, 4)
        except EngineError as error:
            said = str(error)
            assert len(said) < 900 and "is not a vLLM server that can be trained with" in said
            continue
        assert ids.dtype == np.int64 and ids.shape == logprobs.shape and len(ids) <= 4 and isinstance(reason, str)
        assert ((ids >= 0) & (ids < 300)).all() and not (logprobs > 0.01).any() and not np.isinf(logprobs).any()


DESCRIPTION = {
    "results": [
        {"is_cpu": True, "window": 64, "vocabulary": 300, "shapes": {"w": [3, 4]}, "tied": {}, "model": "m",
         "dtype": "float32", "logprobs_mode": "processed_logprobs"}
    ]
}  # fmt: skip


def test_descriptions_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    answers: list[Any] = [DESCRIPTION]
    monkeypatch.setattr(made, "_ask", lambda *_: [answers[-1]])
    assert made.describe() == EngineInfo(**{**DESCRIPTION["results"][0], "shapes": {"w": (3, 4)}})  # type: ignore[arg-type]
    for answers[-1] in mutations(DESCRIPTION):
        try:
            info = made.describe()
        except EngineError as error:
            assert "does not describe itself" in str(error) and len(str(error)) < 700  # noqa: PT017
            continue
        json.dumps(info.logprobs_mode.rpartition(".")), info.window + info.vocabulary
