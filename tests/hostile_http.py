"""A server of raw bytes for tests of HTTP clients, in a thread: no kind of its answers should be believed."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

SECRET = "sk-very-secret-key"

BOMB = gzip.compress(b"0" * (32 << 20), 1)
DEEP = "[" * 200_000 + "]" * 200_000
ANSWERS: dict[str, bytes] = {
    "huge_integer": b'{"choices": ' + b"9" * 10_000 + b"}",
    "deep": DEEP.encode(),
    "deep_inside": b'{"choices": ' + DEEP.encode() + b"}",
    "not_utf8": b'{"choices": "\xff\xfe"}',
    "html": b"<html><body>\x1b[31m502 Bad Gateway</body></html>",
    "empty": b"",
    "text": b'"hello"',
    "number": b"5",
    "null": b"null",
    "list": b"[]",
    "nothing": b"{}",
    "no_choices": b'{"choices": []}',
    "two_choices": b'{"choices": [{}, {}]}',
    "nan": b'{"choices": NaN}',
    "infinity": b'{"choices": [{"text": Infinity, "finish_reason": -Infinity, "token_ids": [1e999]}]}',
}
"""Whole bodies, with status 200."""

REASONS = {
    **dict.fromkeys(["huge_integer", "deep", "deep_inside", "not_utf8", "html", "text", "number", "list"], "bad_json"),
    **dict.fromkeys(["empty", "null"], "bad_json"),
    **dict.fromkeys(["nothing", "no_choices", "two_choices", "nan", "infinity"], "bad_answer"),
    "endless_body": "too_large",
    "long_body": "too_large",
    "gzip_bomb": "compressed",
    "zlib_charset": "bad_json",
    "drip": "timeout",
    "drip_headers": "timeout",
    "silent": "timeout",
    "endless_headers": "connection",
    "endless_line": "connection",
    "endless_continue": "timeout",
    "no_http": "connection",
    "hang_up": "connection",
    "short": "connection",
    "redirect": "redirect",
    "redirect_loop": "redirect",
    "error_page": "http_500",
    "endless_error": "too_large",
    "key_repeated": "http_401",
    "odd_wait": "http_429",
}
"""Every kind of answer and the word by which a teacher's failure is counted."""


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**4000, 2**63, -(2**40), "", "x", "\ud800", "5"),
    *([], [None], [[1]], [True], ["1"], [1.5], [2**70], [-1], [10**9], [{}], [1] * 1000),
    *({}, {"a": 1}, {"1": {"logprob": -1}}, {"x": {"logprob": -1}}, {"40": None}, {"40": {"logprob": "x"}}),
    *({"41": {"logprob": float("nan")}}, {"41": {"logprob": 10**400}}, {"\u0664\u0661": {"logprob": -1}}),
]


def mutations(value: Any) -> Iterator[Any]:
    """The JSON value with each of its parts replaced by each of the values above, or missing."""
    yield from VALUES
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in mutations(inner))
    elif isinstance(value, list):
        for place, inner in list(enumerate(value))[:3]:
            yield value[:place] + value[place + 1 :]
            yield from ([*value[:place], other, *value[place + 1 :]] for other in mutations(inner))


def head(status: str = "200 OK", length: int | None = None, *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", "Connection: close", *more]
    lines += [f"Content-Length: {length}"] if length is not None else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer_of(kind: str) -> Iterator[bytes]:
    """What is sent after a request has been read, piece by piece."""
    if kind in ANSWERS:
        yield head("200 OK", len(ANSWERS[kind])) + ANSWERS[kind]
    elif kind in ("endless_body", "endless_error"):
        yield head("200 OK" if kind == "endless_body" else "500 Oops")
        while True:
            yield b'"' + b"x" * (1 << 20)
    elif kind == "long_body":
        yield head("200 OK", 1 << 40) + b"["
        while True:
            yield b"1," * (1 << 19)
    elif kind == "gzip_bomb":
        yield head("200 OK", len(BOMB), "Content-Encoding: gzip") + BOMB
    elif kind == "zlib_charset":
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=zlib\r\nConnection: close\r\n\r\nx\x9c"
    elif kind == "drip":
        yield head("200 OK", 1000)
        while True:
            time.sleep(0.1)
            yield b" "
    elif kind == "drip_headers":
        yield b"HTTP/1.1 200 OK\r\n"
        while True:
            time.sleep(0.1)
            yield b"X"
    elif kind == "silent":
        time.sleep(30)
    elif kind == "endless_headers":
        yield b"HTTP/1.1 200 OK\r\n"
        while True:
            yield b"X-Header: x\r\n" * 10_000
    elif kind == "endless_line":
        while True:
            yield b"H" * (1 << 16)
    elif kind == "endless_continue":
        while True:
            time.sleep(0.01)
            yield b"HTTP/1.1 100 Continue\r\n\r\n"
    elif kind == "no_http":
        yield b"SSH-2.0-OpenSSH_9.6\r\n"
    elif kind == "short":
        yield head("200 OK", 1000) + b'{"choices"'
    elif kind == "redirect":
        yield head("307 Temporary Redirect", 0, "Location: http://127.0.0.1:9/v1/completions")
    elif kind == "redirect_loop":
        yield head("301 Moved", 0, "Location: /v1/completions")
    elif kind == "error_page":
        page = b"<html>\x1b]0;owned\x07" + b"<br>\n" * 100_000
        yield head("500 Oops", len(page)) + page
    elif kind == "key_repeated":
        page = json.dumps({"error": {"message": f"Incorrect API key provided: {SECRET}"}}).encode()
        yield head("401 No", len(page)) + page
    elif kind == "odd_wait":
        yield head("429 Later", 2, "Retry-After: nan") + b"{}"


@contextlib.contextmanager
def hostile_server(kind: str) -> Iterator[str]:
    """Answers every request with this kind; yields the address."""
    over = threading.Event()

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            data = b""
            while b"\r\n\r\n" not in data:
                data += (piece := connection.recv(1 << 16))
                if not piece:
                    return
            header, _, body = data.partition(b"\r\n\r\n")
            lengths = [
                int(line.split(b":")[1]) for line in header.lower().split(b"\r\n") if line.startswith(b"content-l")
            ]
            while len(body) < sum(lengths):
                body += connection.recv(1 << 16)
            for piece in answer_of(kind):
                if over.is_set():
                    return
                connection.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)
