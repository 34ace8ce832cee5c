"""Worker processes that grade completions, each with a time limit; a worker that fails is replaced."""

from __future__ import annotations

import dataclasses
import selectors
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdengine.errors import ServiceError
from opdengine.types import Message
from opdengine.verifiers.score import Score, VerifierSettings, as_score
from opdengine.workers.process import WorkerEnded, WorkerProcess

MAX_FAILED_STARTS = 5
"""Workers in a row that may end before they grade; then something is wrong with all of them."""
START_SECONDS = 120.0
MAX_REPLY_BYTES = 1 << 16


@dataclass(frozen=True)
class Task:
    """One completion to grade.

    Args:
        verifier: its name, see :func:`opdengine.verifiers.load_verifier`.
        text: the completion.
        answer: what the verifier compares with; reaches it as JSON.
        messages: of the prompt.
    """

    verifier: str
    text: str
    answer: Any
    messages: Sequence[Message]


class WorkerPool:
    """Processes that stay alive between calls; they start when there is work for them.

    A verifier runs in the main thread of a process of its own, so that it may use signals, hang or crash:
    that costs its own completion the grade and nothing else. Workers and all that they start end with
    :meth:`close`, and with this process however it ends. A line of a worker that is no grade costs one, too.

    Args:
        settings: time limit, number of processes.
    """

    def __init__(self, settings: VerifierSettings) -> None:
        self._settings = settings
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()

    def grade(self, tasks: Sequence[Task]) -> list[Score]:
        """One score per task, in order; may be called from any thread, one call runs at a time.

        Raises:
            ServiceError: :data:`MAX_FAILED_STARTS` workers in a row did not come to their first task.
        """
        with self._lock:
            try:
                return self._grade(tasks)
            except BaseException:
                self._end(self._workers)
                raise

    def close(self) -> None:
        """End the workers; safe to call twice."""
        with self._lock:
            self._end(self._workers)

    def _grade(self, tasks: Sequence[Task]) -> list[Score]:
        scores: dict[int, Score] = {}
        waiting = deque(range(len(tasks)))
        running: dict[_Worker, int] = {}
        with selectors.DefaultSelector() as selector:
            while len(scores) < len(tasks):
                while waiting and (worker := self._free(running)) is not None:
                    running[worker] = waiting.popleft()
                    worker.begin(tasks[running[worker]])
                    selector.register(worker.process.socket, selectors.EVENT_READ, worker)
                for worker in running:
                    selector.modify(worker.process.socket, worker.events, worker)
                deadline = min(worker.deadline for worker in running)
                ready = {k.data: e for k, e in selector.select(max(deadline - time.monotonic(), 0.0))}
                for worker in list(running):
                    if (score := worker.advance(ready.get(worker, 0))) is not None:
                        scores[running.pop(worker)] = score
                        selector.unregister(worker.process.socket)
                        if worker.lost:
                            self._end([worker])
                        self._count_start(worker, score)
        return [scores[i] for i in range(len(tasks))]

    def _count_start(self, worker: _Worker, score: Score) -> None:
        self._failed_starts = 0 if worker.started else self._failed_starts + 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise ServiceError(
                f"{self._failed_starts} processes of verifiers in a row did not come to grade anything; correct what "
                f"ends them, the last time ({score.failure}) {score.detail}"
            )

    def _free(self, running: Mapping[_Worker, int]) -> _Worker | None:
        """A worker without a task, if need be a new one; None when all that there may be are busy."""
        for worker in self._workers:
            if worker not in running:
                return worker
        if len(self._workers) == self._settings.workers:
            return None
        self._workers.append(_Worker(self._settings))
        return self._workers[-1]

    def _end(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            worker.process.hang_up()
        for worker in list(workers):
            worker.process.end()
            self._workers.remove(worker)


class _Worker:
    """The owner's side of one process: what it is to be asked, and by when it must answer."""

    def __init__(self, settings: VerifierSettings) -> None:
        self.process = WorkerProcess(MAX_REPLY_BYTES, "opdengine.verifiers.worker")
        self.deadline = 0.0
        self.started = False
        """Whether it has been asked for a grade, so that it and its verifiers could be loaded."""
        self.lost = False
        """Whether it must be ended: nothing that it says can be trusted."""
        self._settings = settings
        self._loaded: set[str] = set()
        self._questions: deque[tuple[dict[str, Any], float]] = deque()
        self._questions.append(({"settings": dataclasses.asdict(settings)}, START_SECONDS))

    @property
    def events(self) -> int:
        """What to wait for, as of :mod:`selectors`."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.process.sending else 0)

    def begin(self, task: Task) -> None:
        """Ask for the grade of a task, after what must come first."""
        if task.verifier not in self._loaded:
            self._loaded.add(task.verifier)
            self._questions.append(({"load": task.verifier}, START_SECONDS))
        grade = {"grade": [task.verifier, task.text, task.answer, task.messages]}
        self._questions.append((grade, self._settings.timeout))
        self._ask()

    def advance(self, events: int) -> Score | None:
        """Go on where the socket allows it; the score when it is known."""
        try:
            if events & selectors.EVENT_WRITE:
                self.process.send()
            answer = self.process.receive() if events & selectors.EVENT_READ else None
        except WorkerEnded:
            return self._lose("crash", f"the verifier's process ended{self.process.tail()}")
        if answer is None:
            late = time.monotonic() > self.deadline
            return self._lose("timeout", f"no grade within {self._limit:g} s") if late else None
        if "broken" in answer:
            return self._lose("error", f"the verifier's process gave {answer['broken'][1]}{self.process.tail()}")
        if self._questions and not answer:
            self._ask()
            return None
        return self._read(answer)

    def _read(self, answer: Mapping[str, Any]) -> Score:
        """The score in an answer."""
        match answer.get("score"):
            case [int() | float() as value, str() as failure, str() as detail] if not self._questions:
                score = as_score(Score(value, failure, detail), "the verifier's process")
                return score if score.failure == failure else self._lose("error", score.detail)
        return self._lose("error", f"the verifier's process gave an answer without a grade: {answer!r:.200}")

    def _lose(self, failure: str, detail: str) -> Score:
        self.lost = True
        return Score(0.0, failure, detail)

    def _ask(self) -> None:
        question, self._limit = self._questions.popleft()
        self.deadline = time.monotonic() + self._limit
        self.started |= "grade" in question
        self.process.ask(question)
