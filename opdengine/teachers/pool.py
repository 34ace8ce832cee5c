"""The endpoints of one exact teacher: they share its questions, and where one fails the others take over."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opdengine.teachers import TeacherError
from opdengine.teachers.endpoint import BadAnswer
from opdengine.teachers.exchange import Answer, AttemptFailed, Expect, Line, exchange
from opdengine.types import Failure
from opdengine.workers.printing import brief

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Questions to one endpoint: while the states of one are on their way, the next is computed."""

OF_THE_QUESTION = ("http_400", "http_413", "http_422")
"""Refusals that every endpoint would give."""

PROBE_SECONDS = 10.0
"""What an endpoint that was lost has to show that it is back."""


class OtherWeightsError(TeacherError):
    """An endpoint answers with other weights than the run began with."""


@dataclass
class Endpoint:
    """One server of a teacher.

    Args:
        url: its address.
        failures: failed attempts since the last that worked.
        failed_at: when the last one failed, by the loop's clock.
        resting: until when it is not asked.
        lost: why it is asked nothing more until it shows that it is back; None while it works.
    """

    url: str
    failures: int = 0
    failed_at: float = 0.0
    resting: float = 0.0
    lost: AttemptFailed | None = None


@dataclass
class Pool:
    """Asks the endpoints of a teacher.

    Args:
        name: of the teacher.
        urls: of its endpoints.
        key: sent to all of them as bearer token.
        timeout: seconds of one attempt, from its first to its last byte.
        max_retries: failed attempts in a row, after the first, until an endpoint counts as lost.
        max_concurrency: most attempts at the same time.
        backoff: seconds before the attempt after a failed one; doubles each time, with jitter.
        longest_wait: bounds them.
        fingerprint: of the weights, which every answer must name; None: not known yet.
    """

    name: str
    urls: Sequence[str]
    key: str | None = None
    timeout: float = 600.0
    max_retries: int = 5
    max_concurrency: int = 32
    backoff: float = 0.5
    longest_wait: float = 60.0
    fingerprint: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    # A generator of its own: jitter must not move the random state of the run.
    _jitter: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.endpoints = [Endpoint(url.rstrip("/")) for url in self.urls]

    async def ask(
        self, endpoint: Endpoint, path: str, question: Any, expect: Expect, timeout: float | None = None
    ) -> Answer:
        """One attempt at one endpoint.

        Raises:
            AttemptFailed: there was no usable answer.
            OtherWeightsError: it is another teacher's.
        """

        def checked(line: Line) -> Sequence[torch.Tensor]:
            self._check(endpoint, line)
            return expect(line)

        limit = self.timeout if timeout is None else min(self.timeout, timeout)
        try:
            return await exchange(endpoint.url, path, question, checked, key=self.key, timeout=limit)
        except AttemptFailed as error:
            if isinstance(error.fingerprint, str):
                self._check(endpoint, {"fingerprint": error.fingerprint})
            raise

    def _check(self, endpoint: Endpoint, line: Line) -> None:
        told = line.get("fingerprint")
        if not isinstance(told, str):
            raise BadAnswer("bad_answer", f"it does not say of which weights it is: {brief(told, 40)}")
        if self.fingerprint is not None and told != self.fingerprint:
            raise OtherWeightsError(
                f"teacher {self.name!r}: {endpoint.url} answers with other weights (or in another dtype) than the run "
                f"began with: {brief(told, 40)} instead of {self.fingerprint!r}; restart it with the model and --dtype "
                "of before, or start a new run"
            )

    async def ask_all(
        self, path: str, questions: Sequence[Any], expects: Sequence[Expect], stop: bool
    ) -> list[Answer | Failure]:
        """Ask every question of whichever endpoint is free; answers come in order.

        A question whose endpoint fails is asked of another one. When all endpoints are lost, what is still open fails.

        Args:
            path: of the endpoints.
            questions: JSON.
            expects: one for each question.
            stop: raise TeacherError at the first question that fails for good.

        Raises:
            OtherWeightsError: an endpoint answers with other weights.
            TeacherError: a question failed for good, with ``stop``.
        """
        answers: dict[int, Answer | Failure] = {}
        waiting: asyncio.Queue[int] = asyncio.Queue()
        slots = asyncio.Semaphore(self.max_concurrency)
        for index in range(len(questions)):
            waiting.put_nowait(index)

        async def attempt(endpoint: Endpoint, index: int) -> Answer | Failure | None:
            await asyncio.sleep(max(endpoint.resting - asyncio.get_running_loop().time(), 0.0))
            async with slots:
                return await self._attempt(endpoint, path, questions[index], expects[index])

        async def work(endpoint: Endpoint) -> None:
            if endpoint.lost is not None and not await self._is_back(endpoint):
                return
            while endpoint.lost is None:
                index = await waiting.get()
                if endpoint.lost is not None:  # meanwhile
                    waiting.put_nowait(index)
                elif (found := await attempt(endpoint, index)) is not None:
                    if isinstance(found, Failure) and stop:
                        raise TeacherError(str(found))
                    answers[index] = found
                else:
                    waiting.put_nowait(index)
                waiting.task_done()

        whole = asyncio.ensure_future(waiting.join())
        open_ = {asyncio.ensure_future(work(endpoint)) for endpoint in self.endpoints for _ in range(IN_FLIGHT)}
        try:
            while open_ and not whole.done():
                ended, _ = await asyncio.wait({whole, *open_}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended - {whole}:
                    open_.discard(task)
                    task.result()
        finally:
            for task in (whole, *open_):
                task.cancel()
            await asyncio.gather(whole, *open_, return_exceptions=True)
        if len(answers) < len(questions):
            failure = self._all_lost()
            if stop:
                raise TeacherError(str(failure))
            logger.warning("%s", failure)
            answers |= {index: failure for index in range(len(questions)) if index not in answers}
        return [answers[index] for index in range(len(questions))]

    async def _attempt(self, endpoint: Endpoint, path: str, question: Any, expect: Expect) -> Answer | Failure | None:
        """An answer, a failure that no endpoint could avoid, or None where another attempt may do better."""
        now = asyncio.get_running_loop().time
        began = now()
        try:
            answer = await self.ask(endpoint, path, question, expect)
        except AttemptFailed as error:
            if error.reason in OF_THE_QUESTION:
                return Failure(self.name, error.reason, f"{endpoint.url}: {error}")
            if began >= endpoint.failed_at:  # two attempts that end together are one failure
                self._note_failure(endpoint, error, now())
            return None
        endpoint.failures = 0
        return answer

    def _note_failure(self, endpoint: Endpoint, error: AttemptFailed, now: float) -> None:
        endpoint.failures += 1
        endpoint.failed_at = now
        if error.may_pass and endpoint.failures <= self.max_retries:
            self.counts[f"teacher_retries/{self.name}"] += 1
            wait = self.backoff * 2 ** (endpoint.failures - 1) * self._jitter.uniform(0.5, 1.0)
            endpoint.resting = now + min(wait, self.longest_wait)
            return
        endpoint.lost = error
        others = [e.url for e in self.endpoints if e.lost is None]
        after = f"{error.reason}: {error}; attempt {endpoint.failures} of {self.max_retries + 1}"
        then = f"{', '.join(others)} takes over" if others else "no other endpoint is left"
        logger.warning("teacher %r has lost %s (%s); %s", self.name, endpoint.url, after, then)

    async def _is_back(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint that was lost answers again."""
        if endpoint.lost is None:
            return True
        try:
            await self.ask(endpoint, "/about", None, lambda line: (), PROBE_SECONDS)
        except AttemptFailed as error:
            endpoint.lost = error
            return False
        endpoint.lost, endpoint.failures, endpoint.resting = None, 0, 0.0
        logger.warning("teacher %r: %s is back", self.name, endpoint.url)
        return True

    def _all_lost(self) -> Failure:
        lost = [(e.url, e.lost) for e in self.endpoints if e.lost is not None]
        reasons = {error.reason for _, error in lost}
        said = "; ".join(f"{url} ({error.reason}: {error})" for url, error in lost)
        what = "no endpoint answers any more: " if len(lost) > 1 else ""
        return Failure(self.name, reasons.pop() if len(reasons) == 1 else "all_lost", what + said)
