"""Calls to an OpenAI-compatible endpoint: each ends with an answer that was read, or with a reason."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from opdengine.teachers import TeacherError
from opdengine.types import Failure
from opdengine.workers.printing import brief, one_line

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

Answer = Mapping[str, Any]
Read = TypeVar("Read")

BASE_BYTES = 8 << 20
"""What any answer may have."""

ENTRY_BYTES = 300
"""What an answer may have for each log-prob that was asked for, and for each token."""

RETRIED_STATUS = (408, 409, 425, 429)
"""Refusals that may pass; every 5xx may pass as well."""


class BadAnswer(ValueError):
    """The server answered something that cannot be used.

    Args:
        reason: one word for the metrics.
        detail: what is wrong with it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass
class Endpoint:
    """One server.

    Args:
        name: of the teacher behind it.
        base_url: up to and including ``/v1``.
        api_key: sent as bearer token; None sends a placeholder.
        timeout: seconds of one attempt, from its first to its last byte.
        max_retries: further attempts after the first.
        max_concurrency: most attempts at the same time.
        stop_on_failure: raise TeacherError at the first failure instead of returning it.
        backoff: seconds before the second attempt; doubles each time, with jitter.
        longest_wait: bounds the seconds before an attempt, the server's ``Retry-After`` included.
    """

    name: str
    base_url: str
    api_key: str | None = None
    timeout: float = 600.0
    max_retries: int = 5
    max_concurrency: int = 32
    stop_on_failure: bool = True
    backoff: float = 0.5
    longest_wait: float = 60.0
    counts: Counter[str] = field(default_factory=Counter)
    # A generator of its own: jitter must not move the random state of the run.
    _jitter: random.Random = field(default_factory=random.Random)

    async def post_all(
        self, path: str, bodies: Sequence[Answer], read: Callable[[int, Answer], Read]
    ) -> list[Read | Failure]:
        """Post every body and read every answer, in order.

        Once a call has failed for good and none has succeeded, the server counts as lost and the
        calls that still wait fail with the same reason: a dead server costs one round of retries.

        Args:
            path: below the base URL.
            bodies: JSON bodies.
            read: (index, answer) -> result; raises BadAnswer for an answer that cannot be used.

        Raises:
            TeacherError: a call failed for good and ``stop_on_failure`` is set.
        """
        slots = asyncio.Semaphore(self.max_concurrency)
        lost: list[Failure] = []
        succeeded = False

        async def one(client: AsyncOpenAI, index: int) -> Read | Failure:
            nonlocal succeeded
            async with slots:
                if lost and not succeeded:
                    return self._failed(lost[0])
                result = await self._call(client, path, bodies[index], lambda answer: read(index, answer))
            if isinstance(result, Failure):
                lost.append(result)
                return self._failed(result)
            succeeded = True
            return result

        try:
            limit = max(map(most_bytes, bodies), default=0)
            async with self._client(limit) as client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(client, index)) for index in range(len(bodies))]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def request(self, method: str, url: str, body: Answer | None = None) -> Answer | Failure:
        """One call outside training (probes): its answer, or the failure, which is not counted."""
        async with self._client(most_bytes(body or {})) as client:
            return await self._call(client, url, body, lambda answer: answer, method)

    def _failed(self, failure: Failure) -> Failure:
        self.counts[f"teacher_failures/{self.name}/{failure.reason}"] += 1
        if self.stop_on_failure:
            raise TeacherError(str(failure))
        logger.warning("%s", failure)
        return failure

    async def _call(
        self,
        client: AsyncOpenAI,
        url: str,
        body: Answer | None,
        read: Callable[[Answer], Read],
        method: str = "post",
    ) -> Read | Failure:
        """All attempts of one call."""
        first = ""
        for attempt in range(self.max_retries + 1):
            try:
                return read(await self._attempt(client, url, body, method))
            except _AttemptFailed as error:
                last = error
            except BadAnswer as error:
                last = _AttemptFailed(error.reason, str(error))
            first = first or f"{last.reason}: {last}"
            if not last.may_pass or attempt == self.max_retries:
                break
            self.counts[f"teacher_retries/{self.name}"] += 1
            wait = max(self.backoff * 2**attempt * self._jitter.uniform(0.5, 1.0), last.wait)
            await asyncio.sleep(min(wait, self.longest_wait))
        detail = f"{last} (attempt {attempt + 1} of {self.max_retries + 1})"
        if not first.startswith(last.reason):  # a crash shows itself once, then nobody is there
            detail += f"; at first {first}"
        if self.api_key:  # some servers repeat it
            detail = detail.replace(self.api_key, "***")
        return Failure(self.name, last.reason, detail)

    async def _attempt(self, client: AsyncOpenAI, url: str, body: Answer | None, method: str) -> Answer:
        import openai

        from opdengine.teachers.bounded import RefusedAnswerError

        try:
            async with asyncio.timeout(self.timeout):
                if method == "get":
                    answer = await client.get(url, cast_to=object)
                else:
                    answer = await client.post(url, cast_to=object, body=body)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _AttemptFailed("timeout", f"no answer within {self.timeout:g} s") from error
        except (RefusedAnswerError, openai.APIConnectionError) as error:
            cause = error if isinstance(error, RefusedAnswerError) else error.__cause__
            if isinstance(cause, RefusedAnswerError):
                raise _AttemptFailed(cause.reason, f"{self.base_url}: {cause}", may_pass=False) from error
            raise _AttemptFailed("connection", f"{self._place()}: {one_line(str(cause or error))}") from error
        except openai.APIStatusError as error:
            status = error.status_code
            raise _AttemptFailed(
                f"http_{status}",
                f"{self._place()} refused with status {status}: {one_line(error.message, 500)}",
                may_pass=status >= 500 or status in RETRIED_STATUS,
                wait=_seconds(error.response.headers.get("retry-after")),
            ) from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError, too
            raise _AttemptFailed("bad_json", f"the answer is not JSON: {one_line(str(error))}") from error
        if not isinstance(answer, Mapping):
            raise _AttemptFailed("bad_json", f"the answer is no JSON object: {brief(answer, 80)}")
        return answer

    def _place(self) -> str:
        """The address, and the proxy between, which may be the one that does not answer."""
        from opdengine.teachers.bounded import proxy_of

        proxy = proxy_of(self.base_url)
        return self.base_url + (f" (by way of the proxy {proxy}; no_proxy leaves addresses out)" if proxy else "")

    @asynccontextmanager
    async def _client(self, limit: int) -> AsyncIterator[AsyncOpenAI]:
        """A client for one batch of calls: its connections belong to the running event loop."""
        from openai import AsyncOpenAI

        from opdengine.teachers.bounded import BoundedClient

        async with AsyncOpenAI(
            base_url=self.base_url,
            # Without a key of ours the client would send the one in OPENAI_API_KEY, to any server.
            api_key=self.api_key or "none",
            timeout=self.timeout,
            max_retries=0,
            http_client=BoundedClient(limit, self.timeout, self.base_url),
        ) as client:
            yield client


class _AttemptFailed(Exception):
    def __init__(self, reason: str, detail: str, may_pass: bool = True, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.reason, self.may_pass, self.wait = reason, may_pass, wait


def most_bytes(body: Answer) -> int:
    """How large the answer to a body may be."""
    prompt, written = body.get("prompt") or (), body.get("max_tokens") or 0
    listed = body.get("prompt_logprobs") or body.get("logprobs") or 0
    return int(BASE_BYTES + ENTRY_BYTES * (len(prompt) * (listed + 2) + written))


def _seconds(retry_after: str | None) -> float:
    """``Retry-After`` in seconds; 0 for the rare form with a date, and for what is no number of seconds."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return seconds if seconds > 0 else 0.0
