"""A fixed number of environments, one worker process each, stepped together and replaced when they break."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from opdengine.environments.answers import REASONS, read_answer
from opdengine.environments.protocol import Broken, InfrastructureError, Observation, Step, Task
from opdengine.metrics import Mean
from opdengine.types import Message
from opdengine.workers.process import WorkerProcess
from opdengine.workers.talk import Talk, WorkerLost, hold

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
BYTES_PER_CHARACTER = 16
MAX_FAILED_STARTS = 5
"""Workers that may fail to start in a row, in all slots together; then the environment is given up."""


class EnvironmentPool:
    """Plays one episode in each of its slots.

    A slot's process and its environment object serve episode after episode. Where the environment hangs,
    crashes, raises or says too much, only that slot's answer is :class:`Broken`: its process is ended with
    everything that it started, and the next reset of the slot starts another one. Nothing of a worker
    outlives the pool or the process that owns it. One call at a time.

    Args:
        name: of the environment, see :func:`opdengine.environments.load_environment`.
        options: keywords of its constructor. ``network`` (default False) is the pool's own: unless it is
            true, workers are cut off from the network where the system allows it (see :attr:`isolated`).
        size: number of slots.
        step_timeout: seconds for one step.
        reset_timeout: seconds for one reset.
        start_timeout: seconds for starting a process and constructing the environment.
        max_observation_chars: most characters of the messages of one answer, as JSON; a whole answer with its
            ``info`` may have 16 times as many bytes.

    Raises:
        InfrastructureError: the environment cannot be started at all; says why.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        size: int = 1,
        *,
        step_timeout: float = 60.0,
        reset_timeout: float = 120.0,
        start_timeout: float = 120.0,
        max_observation_chars: int = 100_000,
    ) -> None:
        if size < 1:
            raise ValueError(f"an environment pool of size {size} is not possible; use at least 1")
        self.name, self.size = name, size
        self._timeouts = {"step": step_timeout, "reset": reset_timeout, "start": start_timeout}
        self._characters = max_observation_chars
        options = dict(options or {})
        self._config = {
            "name": name,
            "network": bool(options.pop("network", False)),
            "options": options,
            "max_observation_chars": max_observation_chars,
        }
        self._workers: dict[int, WorkerProcess] = {}
        self._playing: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._failed_starts = 0
        self.isolated = True
        """Whether every worker so far has been cut off from the network."""
        try:
            failed = self._start(range(size))
        except BaseException:
            self.close()
            raise
        if failed:
            self.close()
            raise InfrastructureError(f"environment {name!r} does not start: {next(iter(failed.values())).detail}")
        if not self.isolated and not self._config["network"]:
            logger.warning("environment %r can reach the network: this system allows no network namespaces", name)

    def reset(self, jobs: Mapping[int, tuple[int, Task]]) -> dict[int, Observation | Broken]:
        """Begin an episode in some slots, whatever they did before.

        Args:
            jobs: slot -> (seed, task).

        Raises:
            InfrastructureError: the environment has not started for :data:`MAX_FAILED_STARTS` times in a row.
        """
        self._check(jobs)
        self._playing -= set(jobs)
        lost = [slot for slot in jobs if slot not in self._workers]
        self._counts["restarts"] += len(lost)
        answers: dict[int, Observation | Broken] = dict(self._start(lost))
        questions = {s: {"reset": [seed, task]} for s, (seed, task) in jobs.items() if s not in answers}
        for slot, answer in self._ask(questions, "reset").items():
            answers[slot] = answer
            if not isinstance(answer, Broken):
                self._playing.add(slot)
        return answers

    def step(self, messages: Mapping[int, Message]) -> dict[int, Step | Broken]:
        """Send one message to each of some slots; all work at the same time.

        Args:
            messages: slot -> the student's message.

        Raises:
            ValueError: a slot has no episode: it was not reset, or its episode has ended or broken.
        """
        self._check(messages)
        idle = sorted(set(messages) - self._playing)
        if idle:
            raise ValueError(f"slots {idle} of environment {self.name!r} have no episode; reset them first")
        answers: dict[int, Step | Broken] = {}
        for slot, answer in self._ask({s: {"step": m} for s, m in messages.items()}, "step").items():
            answers[slot] = answer
            if isinstance(answer, Broken) or answer.done:
                self._playing.discard(slot)
        return answers

    def counts(self) -> dict[str, float]:
        """Since this was last asked: restarts, and broken answers by reason; ``isolated`` is 1 or 0."""
        counts = {name: float(self._counts[name]) for name in ("restarts", *REASONS)}
        self._counts.clear()
        return {**counts, "isolated": Mean(self.isolated)}

    def close(self) -> None:
        """Let the environments close themselves, then end what is left; safe to call twice."""
        workers, self._workers, self._playing = self._workers, {}, set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in workers.values():
            worker.say_goodbye()
        for worker in workers.values():
            worker.wait(max(deadline - time.monotonic(), 0.0))
        _end(workers)

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, slots: Mapping[int, Any]) -> None:
        unknown = sorted(set(slots) - set(range(self.size)))
        if unknown:
            raise ValueError(f"environment pool of size {self.size} has no slots {unknown}")

    def _start(self, slots: Any) -> dict[int, Broken]:
        """Start workers, no more at once than there are processors; what failed, by slot."""
        failed: dict[int, Broken] = {}
        slots, wave = list(slots), max(os.cpu_count() or 1, 2)
        for first in range(0, len(slots), wave):
            now = slots[first : first + wave]
            for slot in now:
                try:
                    self._workers[slot] = WorkerProcess(BYTES_PER_CHARACTER * self._characters)
                except OSError as error:
                    failed[slot] = Broken("start", f"no process could be started: {error}")
                    self._counts["start"] += 1
                    self._failed_starts += 1
            started = [slot for slot in now if slot not in failed]
            for slot, answer in self._ask(dict.fromkeys(started, self._config), "start").items():
                if isinstance(answer, Broken):
                    failed[slot] = answer
                    self._failed_starts += 1
                else:
                    self.isolated &= answer
                    self._failed_starts = 0
        if failed and self._failed_starts >= MAX_FAILED_STARTS:
            raise InfrastructureError(
                f"environment {self.name!r} has not started {self._failed_starts} times in a row; correct what fails, "
                f"the last time {next(reversed(failed.values())).detail}"
            )
        return failed

    def _ask(self, questions: Mapping[int, Mapping[str, Any]], kind: str) -> dict[int, Any]:
        """The answers of all slots; those that broke have lost their worker."""
        answers: dict[int, Any] = {}

        def ask(slot: int, question: Mapping[str, Any]) -> Talk[None]:
            try:
                answers[slot] = read_answer((yield self._workers[slot], question, self._timeouts[kind]), kind)
            except WorkerLost as lost:
                answers[slot] = Broken(lost.reason, f"{kind!r}: {lost.detail}")

        try:
            hold(ask(slot, question) for slot, question in questions.items())
        except BaseException:
            _end({slot: self._workers.pop(slot) for slot in questions if slot not in answers})
            raise
        answers |= self._lose({slot: answer for slot, answer in answers.items() if isinstance(answer, Broken)})
        return {slot: answers[slot] for slot in questions}

    def _lose(self, broken: Mapping[int, Broken]) -> dict[int, Broken]:
        """End the workers of these slots, count why and add what they printed last."""
        workers = {slot: self._workers.pop(slot) for slot in broken}
        tails = {slot: worker.tail() for slot, worker in workers.items()}
        codes = _end(workers)
        self._counts.update(answer.reason for answer in broken.values())
        lost = {}
        for slot, answer in broken.items():
            code = f" (exit code {codes[slot]})" if answer.reason == "crash" else ""
            lost[slot] = Broken(answer.reason, f"{answer.detail}{code}{tails[slot]}")
            logger.warning("environment %r, slot %d: %s: %s", self.name, slot, answer.reason, lost[slot].detail)
        return lost


def _end(workers: Mapping[int, WorkerProcess]) -> dict[int, int | None]:
    for worker in workers.values():
        worker.hang_up()
    return {slot: worker.end() for slot, worker in workers.items()}
