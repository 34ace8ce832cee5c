"""One question to an exact teacher on another machine, and its answer, read straight into the tensors it fills."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch

from opdengine.teachers.endpoint import RETRIED_STATUS, BadAnswer
from opdengine.teachers.wire import MOST_LINE, raw, shapes
from opdengine.workers.printing import brief, one_line

Line = Mapping[str, Any]
Answer = tuple[Line, Sequence[torch.Tensor]]
Expect = Callable[[Line], Sequence[torch.Tensor]]
"""Line of an answer -> empty tensors that its bytes will fill; raises BadAnswer where it is not what was asked for."""

CONNECT_SECONDS = 30.0
PIECE = 1 << 18
"""Bytes that are read at a time."""


class AttemptFailed(Exception):
    """A question without a usable answer.

    Args:
        reason: one word for the metrics.
        detail: what went wrong.
        may_pass: whether another attempt at the same endpoint may do better.
        fingerprint: of the weights that a refusal names, if it does.
    """

    def __init__(self, reason: str, detail: str, may_pass: bool = True, fingerprint: Any = None) -> None:
        super().__init__(detail)
        self.reason, self.may_pass, self.fingerprint = reason, may_pass, fingerprint


async def exchange(
    url: str, path: str, question: Any, expect: Expect, *, key: str | None = None, timeout: float = 600.0
) -> Answer:
    """Ask one endpoint once.

    Args:
        url: ``http(s)://host:port``, with a path before the endpoints if need be.
        path: of the endpoint.
        question: JSON; None asks by GET.
        expect: prepares what the answer fills, so that no answer can be larger than what was asked for.
        key: sent as bearer token.
        timeout: seconds until the answer must be whole.

    Raises:
        AttemptFailed: there was no usable answer; the key is never in the message.
    """
    fingerprint = None
    try:
        async with asyncio.timeout(timeout):
            return await _exchange(url, path, question, expect, key, min(timeout, CONNECT_SECONDS))
    except TimeoutError:
        reason, detail, may_pass = "timeout", f"no answer within {timeout:g} s", True
    except AttemptFailed as error:
        reason, detail, may_pass, fingerprint = error.reason, str(error), error.may_pass, error.fingerprint
    except BadAnswer as error:
        reason, detail, may_pass = error.reason, str(error), True
    except asyncio.IncompleteReadError:
        reason, detail, may_pass = "connection", "the connection was cut before the end of the answer", True
    except (OSError, asyncio.LimitOverrunError) as error:
        reason, detail, may_pass = "connection", one_line(f"{type(error).__name__}: {error}"), True
    detail = detail.replace(key, "***") if key else detail  # some servers repeat it
    raise AttemptFailed(reason, detail, may_pass, fingerprint)


async def _exchange(url: str, path: str, question: Any, expect: Expect, key: str | None, connecting: float) -> Answer:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    try:
        async with asyncio.timeout(connecting):
            reader, writer = await asyncio.open_connection(
                parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None
            )
    except TimeoutError:
        raise AttemptFailed("connection", f"no connection within {connecting:g} s") from None
    try:
        writer.write(_request(parts.netloc, parts.path.rstrip("/") + path, question, key))
        await writer.drain()
        return await _answer(reader, expect)
    finally:
        writer.transport.abort()  # what is still on its way is not wanted; closing in order could wait for a dead peer


def _request(host: str, path: str, question: Any, key: str | None) -> bytes:
    body = b"" if question is None else json.dumps(question).encode()
    lines = [f"{'GET' if question is None else 'POST'} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += [] if question is None else ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _answer(reader: asyncio.StreamReader, expect: Expect) -> Answer:
    """Read one answer of HTTP/1.1 that says how long it is."""
    status, length = _read_head((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
    if status != 200:
        body = await reader.readexactly(min(length, 1 << 16))
        passes = status >= 500 or status in RETRIED_STATUS
        said, fingerprint = _refusal(body)
        raise AttemptFailed(f"http_{status}", f"it refused with status {status}: {said}", passes, fingerprint)
    line, size = await _line(reader, length)
    tensors = expect(line)
    if line.get("tensors") != (expected := shapes(tensors)):
        sent = brief(line.get("tensors"), 100)
        raise BadAnswer("wrong_shape", f"tensors {sent}, where {brief(expected, 100)} were asked for")
    awaited = sum(t.numel() * t.element_size() for t in tensors)
    if length - size != awaited:
        raise BadAnswer("wrong_size", f"{length - size} bytes of tensors, where {awaited} were asked for")
    for tensor in tensors:
        await _fill(reader, raw(tensor))
    return line, tensors


def _read_head(text: str) -> tuple[int, int]:
    """Status and length of an answer's body."""
    first, *rest = text.split("\r\n")
    words = first.split(" ", 2)
    fields = {name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in rest)}
    length = fields.get("content-length", "")
    if not (words[0].startswith("HTTP/1.") and len(words) > 1 and words[1].isdecimal() and len(words[1]) == 3):
        raise BadAnswer("bad_answer", f"no answer of HTTP: {brief(first, 80)}")
    if not (length.isascii() and length.isdecimal() and len(length) < 16) or "transfer-encoding" in fields:
        raise BadAnswer("bad_answer", "an answer that does not say how long it is")
    return int(words[1]), int(length)


async def _line(reader: asyncio.StreamReader, length: int) -> tuple[Line, int]:
    """The line at the beginning of an answer, and its bytes."""
    found = bytearray()
    while not found.endswith(b"\n"):
        try:
            found += await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:  # longer than the reader's buffer
            found += await reader.readexactly(max(error.consumed, 1))
        if len(found) > min(MOST_LINE, length):
            raise BadAnswer("too_large", f"a line of more than {min(MOST_LINE, length)} bytes")
    try:
        line = json.loads(found)
    except (ValueError, RecursionError) as error:
        raise BadAnswer("bad_json", f"the line is not JSON: {one_line(str(error))}") from None
    if not isinstance(line, Mapping):
        raise BadAnswer("bad_json", f"the line is no JSON object: {brief(line, 80)}")
    return line, len(found)


async def _fill(reader: asyncio.StreamReader, place: memoryview) -> None:
    done = 0
    while done < len(place):
        piece = await reader.read(min(PIECE, len(place) - done))
        if not piece:
            raise asyncio.IncompleteReadError(b"", len(place) - done)
        place[done : done + len(piece)] = piece
        done += len(piece)


def _refusal(body: bytes) -> tuple[str, Any]:
    """What a refusal says, briefly, and of which weights it is."""
    try:
        answer = json.loads(body)
        said = answer["error"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return repr(body[:200]), None
    return one_line(said, 600) if isinstance(said, str) else brief(said, 200), answer.get("fingerprint")
