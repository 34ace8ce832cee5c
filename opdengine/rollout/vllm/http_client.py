"""JSON over HTTP with errors that tell apart who failed: many requests at a time, all or none."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from opdengine.workers.printing import brief, one_line

MOST_BYTES = 16 << 20
"""Of one answer, where nothing else is said."""

TICK_SECONDS = 0.2
QUEUE_SECONDS = 0.01


class HTTPError(RuntimeError):
    """The server answered with an error; ``status`` is its number."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status


class UnreachableError(RuntimeError):
    """The server could not be reached or broke the connection."""


class SilentError(RuntimeError):
    """The server did not answer in time, or did not come to the end of its answer."""


class GarbledError(RuntimeError):
    """The answer is not what it should be."""


class JSONClient:
    """Talks JSON with one server.

    Args:
        base_url: ``http://host:port``, with a path before the endpoints if need be, or ``unix:/path`` of a socket.
        concurrency: requests in flight at a time.
    """

    def __init__(self, base_url: str, concurrency: int = 256) -> None:
        parts = urlsplit(base_url)
        self._connect: Callable[..., HTTPConnection]
        if parts.scheme == "unix" and parts.path:
            self._connect, self._path = partial(_UnixConnection, parts.path), ""
        elif parts.scheme in ("http", "https") and parts.hostname:
            kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
            self._connect, self._path = partial(kind, parts.hostname, parts.port), parts.path.rstrip("/")
        else:
            raise ValueError(f"{base_url!r} is not a server's address; write it like http://127.0.0.1:8000")
        self.base_url = base_url.rstrip("/")
        self.host = parts.hostname or "localhost"
        self.concurrency = concurrency
        self._open: dict[HTTPConnection, float] = {}  # to the time at which its answer must be whole
        self._sockets: dict[HTTPConnection, socket.socket] = {}
        self._guard = threading.Lock()

    def call(self, path: str, body: Any = None, timeout: float = 60.0) -> Any:
        """POST ``body`` (GET without one); returns the answer's JSON, None if it is empty."""
        (answer,) = self.call_all(path, [body], timeout)
        return answer

    def call_all(self, path: str, bodies: Sequence[Any], timeout: float, limit: int = MOST_BYTES) -> list[Any]:
        """One request for each body; the first failure ends the others.

        Args:
            path: endpoint.
            bodies: JSON values; None for a GET.
            timeout: seconds from the start of one request to the end of its answer.
            limit: most bytes of one answer.

        Raises:
            HTTPError, UnreachableError, SilentError, GarbledError: see there.
        """
        local = threading.local()
        over = threading.Event()
        errors: list[Exception] = []

        def one(body: Any) -> Any:
            if over.is_set():
                return None
            if not hasattr(local, "connection"):
                local.connection = self._connect(timeout=timeout)
            deadline = time.monotonic() + timeout
            self._due(local.connection, deadline)
            try:
                answer = self._exchange(local.connection, path, body, timeout, limit)
                self._due(local.connection, math.inf)
                return answer
            except Exception as error:
                errors.append(error)  # the first one is the cause of the others
                over.set()
                raise

        pool = ThreadPoolExecutor(max(1, min(self.concurrency, len(bodies))), thread_name_prefix="http")
        futures = [pool.submit(one, body) for body in bodies]
        try:
            while wait(futures, TICK_SECONDS, return_when=FIRST_EXCEPTION).not_done and not errors:
                self._hang_up_late()
            if errors:
                raise errors[0]
            return [future.result() for future in futures]
        finally:
            over.set()
            self.hang_up()
            while wait(futures, timeout=0.1).not_done:
                self.hang_up()  # again: a thread may just have been connecting
            pool.shutdown()

    def hang_up(self) -> None:
        """End every request in flight, from any thread; the server drops what it was asked."""
        with self._guard:
            for connection in self._open:
                self._end(connection)
            self._open.clear()
            self._sockets.clear()

    def _due(self, connection: HTTPConnection, deadline: float) -> None:
        with self._guard:
            self._open[connection] = deadline

    def _hang_up_late(self) -> None:
        """End requests whose time is over; a server that sends a byte now and then never lets a socket time out."""
        now = time.monotonic()
        with self._guard:
            for connection, deadline in self._open.items():
                if now > deadline:
                    self._end(connection)

    def _end(self, connection: HTTPConnection) -> None:
        """Close from any thread; a thread that reads from it gets an error at once."""
        for sock in (connection.sock, self._sockets.get(connection)):
            if sock is not None:
                with contextlib.suppress(OSError):  # already closed
                    sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _exchange(self, connection: HTTPConnection, path: str, body: Any, timeout: float, limit: int) -> Any:
        where = f"{self.base_url}{path}"
        late = time.monotonic() + timeout
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            connection.request("GET" if body is None else "POST", self._path + path, data, headers)
            with self._guard:
                self._sockets[connection] = connection.sock  # which it forgets where the server wants to close it
            response = connection.getresponse()
            content = _read(response, limit)
        except TimeoutError:
            raise SilentError(f"{where} gave no answer in {timeout:.0f} s") from None
        except (OSError, HTTPException, AttributeError, ValueError) as error:  # the last two after a hang up
            if time.monotonic() > late:
                raise SilentError(f"{where} gave no answer in {timeout:.0f} s") from None
            raise UnreachableError(f"{where}: {type(error).__name__}: {one_line(str(error))}") from error
        if content is None:
            raise GarbledError(f"{where} answered with more than {limit} bytes")
        if time.monotonic() > late:  # hung up in the middle, and what came before looks like a whole answer
            raise SilentError(f"{where} gave no answer in {timeout:.0f} s")
        if response.status != 200:
            raise HTTPError(response.status, f"{where}: {_message(content)}")
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise GarbledError(f"{where} answered with something that is not JSON: {content[:200]!r}") from None


class _UnixConnection(HTTPConnection):
    """Over a socket in the file system."""

    def __init__(self, file: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._file = file

    def connect(self) -> None:
        """Wait for a place in the server's queue, as TCP does; such a socket refuses at once where it is full."""
        deadline = time.monotonic() + (self.timeout or 0.0)
        sock = self.sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(self.timeout)
        while True:
            try:
                return sock.connect(self._file)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("the queue of the socket is full") from None
                time.sleep(QUEUE_SECONDS)


def _read(response: HTTPResponse, limit: int) -> bytes | None:
    """The body; None if it is larger than it may be."""
    if response.length is not None:
        return response.read() if response.length <= limit else None
    content = response.read(limit + 1)
    return content if len(content) <= limit else None


def _message(content: bytes) -> str:
    """What an error page says, briefly."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return repr(content[:300])
    if isinstance(answer, Mapping):
        answer = answer.get("error", answer.get("detail", answer))
        answer = answer.get("message", answer) if isinstance(answer, Mapping) else answer
    return one_line(answer, 600) if isinstance(answer, str) else brief(answer, 300)
