"""``opdengine teacher-serve``: a model that answers contexts with final hidden states, for trainers on other machines.

:mod:`opdengine.teachers.remote` is the other side.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import select
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from opdengine.errors import ConfigError
from opdengine.models.backbone import default_device
from opdengine.rollout.vllm.serve import is_loopback
from opdengine.teachers.pictures import MOST_CHARACTERS
from opdengine.teachers.served_model import RefusedError, Reply, Served
from opdengine.teachers.wire import name_of, raw, shapes
from opdengine.workers.printing import brief, one_line

logger = logging.getLogger(__name__)

MOST_BYTES = 16 << 20
"""Of one question, beside :data:`TOKEN_BYTES` for each token that it may have, and its pictures."""

TOKEN_BYTES = 40
"""Of ids and targets in JSON, where a question to write has four times the tokens."""

MOST_CONNECTIONS = 1024
"""At the same time; a further one is closed and may come again."""

SOCKET_SECONDS = 60.0
"""How long a client may neither send nor take a byte."""

PIECE = 1 << 20
"""Bytes that are sent at a time: the time limit is that of one piece, and a head is large."""

HELD = 2
"""Answers in memory: while one is sent, the next is computed."""

UNKNOWN_ASKER = (401, 403)
"""Whoever is refused like this learns nothing of the model."""

SHORTEST_TOKEN = 16
"""Characters; what is shorter can be guessed."""


class Handler(BaseHTTPRequestHandler):
    """Answers ``/about``, ``/head``, ``/score`` and ``/generate``.

    Args:
        served: the model.
        token: that every question must carry; None asks for none.
        holding: bounds the answers in memory.
        given: of the base class.
    """

    protocol_version = "HTTP/1.1"
    timeout = SOCKET_SECONDS

    def __init__(self, served: Served, token: str | None, holding: threading.Semaphore, *given: Any) -> None:
        self._served, self._token, self._holding = served, token, holding
        super().__init__(*given)

    def do_GET(self) -> None:
        """What the model is, and its head."""
        known = {"/about": self._served.about, "/head": self._served.send_head}
        self._reply(lambda: self._send_answer(*self._found(known)()))

    def do_POST(self) -> None:
        """Judge contexts, or go on with prompts."""
        self._reply(self._compute)

    def _compute(self) -> None:
        answer = self._found({"/score": self._served.score, "/generate": self._served.write})
        body = self._body()
        with self._holding:
            self._send_answer(*answer(body, self._waits))

    def _found(self, known: Mapping[str, Callable[..., Reply]]) -> Callable[..., Reply]:
        if (answer := known.get(self.path)) is None:
            raise RefusedError(404, f"there is no {brief(self.path, 60)}; 'opdengine teacher-serve' answers here")
        return answer

    def _reply(self, work: Callable[[], None]) -> None:
        """Answer whoever has the token; what is refused or fails is said."""
        self.close_connection = True
        try:
            self._check_asker()
            work()
        except RefusedError as error:
            of = {"fingerprint": self._served.fingerprint} if error.status not in UNKNOWN_ASKER else {}
            self._send(error.status, {"error": str(error), **of})
        except OSError:  # the client has gone
            return
        except Exception as error:
            logger.exception("%s failed", self.path)
            self._send(500, {"error": one_line(f"{type(error).__name__}: {error}")})

    def _check_asker(self) -> None:
        """Refuse whoever lacks the token, which is compared in constant time.

        Where there is none, a page in a browser could have its own name lead to this machine; its questions bear that.
        """
        if self._token is None:
            if not is_loopback(re.sub(r":\d+$", "", self.headers.get("Host", ""))):
                raise RefusedError(403, "this server has no token and answers as 127.0.0.1 or localhost only")
            return
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise RefusedError(401, "this server asks for its token")

    def _body(self) -> bytes:
        # A page in a browser cannot send this type elsewhere without being asked first, which nobody answers.
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "a question is application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 16):
            raise RefusedError(411, "a question says how long it is (Content-Length)")
        most = MOST_BYTES + TOKEN_BYTES * self._served.max_tokens
        most += 0 if self._served.vision is None else MOST_CHARACTERS
        if int(length) > most:
            raise RefusedError(413, f"a question of {length} bytes, which may have {most}; ask in parts")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the question was cut")
        return body

    def _waits(self) -> bool:
        """Whether the client has not closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return not readable or bool(self.connection.recv(1, socket.MSG_PEEK))

    def _send_answer(self, line: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        self._send(200, {**line, "fingerprint": self._served.fingerprint, "tensors": shapes(tensors)}, tensors)

    def _send(self, status: int, line: Mapping[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """One line, then the tensors, one at a time."""
        head = json.dumps(line).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(head) + sum(t.numel() * t.element_size() for t in tensors)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(head)
        for tensor in tensors:
            view = raw(tensor.detach().cpu().contiguous())
            for begin in range(0, len(view), PIECE):
                self.wfile.write(view[begin : begin + PIECE])

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single questions."""


class Server(ThreadingHTTPServer):
    """A thread for every connection, of which there are not too many."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: Callable[..., Any]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._open = threading.Semaphore(MOST_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or hang up where there are too many."""
        if not self._open.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for another connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of our business."""


def server_of(served: Served, host: str, port: int, token: str | None) -> Server:
    """A server of a model; ``serve_forever`` starts it.

    Args:
        served: the model.
        host: a loopback address, or another one with a token.
        port: 0 takes a free one.
        token: that every question must carry.

    Raises:
        ConfigError: the address is not possible.
    """
    require_safe(host, token)
    handler = partial(Handler, served, token, threading.Semaphore(HELD))
    try:
        return Server((host.strip("[]"), port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port} is not possible ({error}); choose another address") from None


def require_safe(host: str, token: str | None) -> None:
    """Raise ConfigError where anyone on a network could ask."""
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, so every question must carry a token: put one into a "
            "variable or a file (openssl rand -hex 32) and name it with --token_env or --token_file"
        )


def read_token(variable: str | None, file: str | None) -> str | None:
    """The token that every question must carry, from an environment variable or a file; None asks for none.

    Raises:
        ConfigError: both are named, it is not there, or it is none. No message repeats it.
    """
    if variable is None and file is None:
        return None
    if variable is not None and file is not None:
        raise ConfigError("--token_env and --token_file are both given; give one of them")
    if variable is not None:
        if not (variable.isidentifier() and variable.isascii()):
            raise ConfigError("--token_env is the name of an environment variable such as TEACHER_TOKEN, not the token")
        where, token = f"the environment variable {variable!r} of --token_env", os.environ.get(variable, "")
    else:
        assert file is not None
        where = "the file of --token_file"
        try:
            token = Path(file).read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigError(f"{where} cannot be read: {reason}") from None
    if not token:
        raise ConfigError(f"{where} is not set or empty")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"{where} holds a blank or another character that no token has")
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"{where} holds fewer than {SHORTEST_TOKEN} characters, which can be guessed")
    return token


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token_env: str | None = None,
    token_file: str | None = None,
    max_tokens_per_batch: int = 16384,
    say: Callable[[str], None] = logger.info,
    **options: Any,
) -> int:
    """Serve a model until it is interrupted.

    Args:
        model: folder or hub name.
        host: a loopback address, or another one with a token.
        port: 0 takes a free one.
        token_env, token_file: where the token is; see :func:`read_token`.
        max_tokens_per_batch: see :class:`Served`.
        say: is told the address once it answers.
        options: of :class:`Served`.

    Raises:
        ConfigError: an option is not possible.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {brief(port)} is no port; it lies between 0 (a free one) and 65535")
    if not 2 <= max_tokens_per_batch < 1 << 31:
        raise ConfigError(f"--max_tokens_per_batch {brief(max_tokens_per_batch)} is not possible; give 2 or more")
    token = read_token(token_env, token_file)
    require_safe(host, token)
    served = Served(model, device=default_device(), max_tokens=max_tokens_per_batch, **options)
    with server_of(served, host, port, token) as server:
        shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
        say(f"http://{shown}:{server.server_address[1]} serves {served.name} ({name_of(served.head.weight.dtype)})")
        server.serve_forever()
    return 0
