"""Conversations with many workers at a time, each with its own time limits, and the worker's side of them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from opdengine.workers.process import CHUNK, WorkerEnded, WorkerProcess

Question = Mapping[str, Any]
Answer = dict[str, Any]
T = TypeVar("T")
Talk = Generator[tuple[WorkerProcess, Question | None, float], Answer, T]
"""Yields a worker, a question (None: still the last one) and the seconds that it has to answer, and is sent the answer
or thrown a :class:`WorkerLost`; ends when it has nothing more to ask. A talk may be part of another, by its result."""


class WorkerLost(Exception):
    """A worker gave no answer that can be used, and nothing that it says now can be trusted: end it.

    Args:
        reason: "crash", "timeout", or what is wrong with the line that it sent.
        detail: what is known of it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def hold(talks: Iterable[Talk[None]]) -> None:
    """Lead talks to their ends, all at the same time; no two ask the same worker at a time."""
    with selectors.DefaultSelector() as selector:
        for talk in talks:
            _go_on(selector, talk)
        while waiting := list(selector.get_map().values()):
            deadline = min(key.data.deadline for key in waiting)
            ready = {key.fd: events for key, events in selector.select(max(deadline - time.monotonic(), 0.0))}
            for key in waiting:
                key.data.advance(selector, ready.get(key.fd, 0))


class _Turn:
    """A question in flight."""

    def __init__(self, talk: Talk[None], worker: WorkerProcess, question: Question | None, seconds: float) -> None:
        self.talk, self.worker, self.seconds = talk, worker, seconds
        self.deadline = time.monotonic() + seconds
        if question is not None:
            worker.ask(question)

    def advance(self, selector: selectors.BaseSelector, events: int) -> None:
        """Send and receive what the socket allows; the talk goes on where its worker has answered or is lost."""
        try:
            answer = self._exchange(events)
        except WorkerLost as lost:
            selector.unregister(self.worker.socket)
            _go_on(selector, self.talk, lost=lost)
            return
        if answer is not None:
            selector.unregister(self.worker.socket)
            _go_on(selector, self.talk, answer)
        elif events & selectors.EVENT_WRITE and not self.worker.sending:
            selector.modify(self.worker.socket, selectors.EVENT_READ, self)

    def _exchange(self, events: int) -> Answer | None:
        try:
            if events & selectors.EVENT_WRITE:
                self.worker.send()
            answer = self.worker.receive() if events & selectors.EVENT_READ else None
        except WorkerEnded:
            raise WorkerLost("crash", "its process ended") from None
        if answer is None and time.monotonic() >= self.deadline:
            raise WorkerLost("timeout", f"no answer within {self.seconds:g} s")
        return answer


def _go_on(
    selector: selectors.BaseSelector, talk: Talk[None], answer: Answer | None = None, lost: WorkerLost | None = None
) -> None:
    """Let a talk ask its next question, if it has one."""
    try:
        turn = _Turn(talk, *(talk.throw(lost) if lost is not None else talk.send(answer)))  # type: ignore[arg-type]
    except StopIteration:
        return
    selector.register(turn.worker.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, turn)


def answer_questions(channel: int, answer: Callable[[Question], Answer | None]) -> None:
    """In a worker: answer lines of JSON until the owner hangs up or an answer is None.

    What is printed meanwhile goes to the log, which holds the last question's output only. An empty line says that
    the last answer is not wanted any more, which may come too late.

    Args:
        channel: file descriptor of the socket to the owner.
        answer: question -> answer; it gets the question's ``number`` here.
    """
    with socket.socket(fileno=channel) as owner:
        for line in _lines(owner):
            if not line.strip():
                continue
            question = json.loads(line)
            with contextlib.suppress(OSError):
                os.ftruncate(1, 0)
            said = answer(question)
            if said is None:
                return
            owner.sendall(json.dumps({**said, "number": question["number"]}).encode() + b"\n")


def _lines(owner: socket.socket) -> Iterator[bytes]:
    """Lines as they come; what is behind one stays in the socket, where an answer in the making can see it."""
    line = bytearray()
    while chunk := owner.recv(CHUNK, socket.MSG_PEEK):
        line += owner.recv(chunk.find(b"\n") + 1 or len(chunk))
        if line.endswith(b"\n"):
            yield bytes(line)
            line.clear()
