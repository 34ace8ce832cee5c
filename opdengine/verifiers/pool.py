"""Worker processes that grade completions, each with a time limit; a worker that fails is replaced."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdengine.errors import ServiceError
from opdengine.types import Message
from opdengine.verifiers.score import Score, VerifierSettings, as_score
from opdengine.workers.process import WorkerProcess
from opdengine.workers.talk import Talk, WorkerLost, hold

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
        self._workers: dict[int, _Worker] = {}
        self._failed_starts = 0
        self._lock = threading.Lock()

    def grade(self, tasks: Sequence[Task]) -> list[Score]:
        """One score per task, in order; may be called from any thread, one call runs at a time.

        Raises:
            ServiceError: :data:`MAX_FAILED_STARTS` workers in a row did not come to their first task.
        """
        with self._lock:
            scores: dict[int, Score] = {}
            waiting = deque(enumerate(tasks))
            try:
                hold(self._work(slot, waiting, scores) for slot in range(min(self._settings.workers, len(tasks))))
            except BaseException:
                self._end(list(self._workers))
                raise
            return [scores[i] for i in range(len(tasks))]

    def close(self) -> None:
        """End the workers; safe to call twice."""
        with self._lock:
            self._end(list(self._workers))

    def _work(self, slot: int, waiting: deque[tuple[int, Task]], scores: dict[int, Score]) -> Talk[None]:
        """Grade what waits until nothing does, with a new process for every one that is lost."""
        while waiting:
            number, task = waiting.popleft()
            if slot not in self._workers:
                self._workers[slot] = _Worker(self._settings)
            worker = self._workers[slot]
            try:
                scores[number] = yield from worker.grade(task)
            except WorkerLost as lost:
                scores[number] = Score(
                    0.0, lost.reason, f"the verifier's process: {lost.detail}{worker.process.tail()}"
                )
                self._end([slot])
            self._count_start(worker, scores[number])

    def _count_start(self, worker: _Worker, score: Score) -> None:
        self._failed_starts = 0 if worker.started else self._failed_starts + 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise ServiceError(
                f"{self._failed_starts} processes of verifiers in a row did not come to grade anything; correct what "
                f"ends them, the last time ({score.failure}) {score.detail}"
            )

    def _end(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._workers[slot].process.hang_up()
        for slot in slots:
            self._workers.pop(slot).process.end()


class _Worker:
    """The owner's side of one process: what it has been told so far."""

    def __init__(self, settings: VerifierSettings) -> None:
        self.process = WorkerProcess(MAX_REPLY_BYTES, "opdengine.verifiers.worker")
        self.started = False
        """Whether it has been asked for a grade, so that it and its verifiers could be loaded."""
        self._settings = settings
        self._loaded: set[str] = set()

    def grade(self, task: Task) -> Talk[Score]:
        """Ask for the grade of a task, after what must come first."""
        first: list[dict[str, Any]] = [] if self._loaded else [{"settings": dataclasses.asdict(self._settings)}]
        if task.verifier not in self._loaded:
            self._loaded.add(task.verifier)
            first.append({"load": task.verifier})
        for question in first:
            if answer := (yield self.process, question, START_SECONDS):
                raise _without_grade(answer)
        self.started = True
        question = {"grade": [task.verifier, task.text, task.answer, task.messages]}
        answer = yield self.process, question, self._settings.timeout
        match answer.get("score"):
            case [int() | float() as value, str() as failure, str() as detail]:
                score = as_score(Score(value, failure, detail), "the verifier's process")
                if score.failure == failure:
                    return score
                raise WorkerLost("error", score.detail)
        raise _without_grade(answer)


def _without_grade(answer: Mapping[str, Any]) -> WorkerLost:
    if "broken" in answer:
        return WorkerLost("error", str(answer["broken"][1]))
    return WorkerLost("error", f"an answer without a grade: {answer!r:.200}")
