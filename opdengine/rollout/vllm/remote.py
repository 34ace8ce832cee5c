"""vLLM's own server as an engine, over HTTP: one of this run, or one that ``opdengine vllm-serve`` has started.

Requests and answers are token ids; weights go through a file that both can read. Several ranks may sample from one
server at a time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdengine.rollout.vllm.engine import (
    EngineDiedError,
    EngineError,
    EngineInfo,
    InvalidRequestError,
    PicturePrompt,
    Sampled,
    end_of_log,
)
from opdengine.rollout.vllm.folders import private_folders, remove_folders
from opdengine.rollout.vllm.http_client import GarbledError, HTTPError, JSONClient, SilentError, UnreachableError
from opdengine.rollout.vllm.policy_file import StoredPolicy
from opdengine.rollout.vllm.serve import server_command
from opdengine.workers.printing import brief, one_line
from opdengine.workers.process import WorkerProcess

logger = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
RESET = "/reset_prefix_cache?reset_running_requests=true"
NOT_A_LOGPROB = -9999.0
MOST_ABOVE = 1e-3
"""What rounding may add to a log-prob of 0."""
BASE_BYTES, TOKEN_BYTES, DESCRIPTION_BYTES = 1 << 20, 1 << 10, 256 << 20
"""What an answer may have, what it may have besides for each token, and what the shapes of all weights may have."""
NUMBERS, TEXTS = ("window", "vocabulary"), ("model", "dtype", "logprobs_mode")
"""What an engine says of itself in numbers and in words."""
SHORTEST = 8
"""The shortest window that can be probed."""
ATTEMPTS = 3
PAUSE_SECONDS, POLL_SECONDS = 1.0, 0.3
RESUME = "continue the run with --resume_from_checkpoint latest"


class OwnServer:
    """``opdengine vllm-serve`` as a child of this process, behind a socket that only its user can open.

    Args:
        model, dtype, max_model_len, devices: see :func:`opdengine.rollout.vllm.serve.server_command`.
        extra: further arguments of ``vllm serve``.
        timeout: seconds until it must answer.

    Attributes:
        url: its address, for :class:`~opdengine.rollout.vllm.http_client.JSONClient`.
        log: file of all that it prints.

    Raises:
        EngineError: it ended or did not answer in time; the message holds the end of its log.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        max_model_len: int | None,
        extra: Sequence[str],
        devices: str | None,
        timeout: float,
    ) -> None:
        self._folders = private_folders()
        socket_file, self.log = f"{self._folders[0]}/socket", f"{self._folders[-1]}/server.log"
        self.url = f"unix:{socket_file}"
        command, environment = server_command(
            model, "127.0.0.1", 0, dtype, max_model_len, extra=[*extra, "--uds", socket_file], devices=devices
        )
        self.process = WorkerProcess(command=command, environment=environment, left=self._folders, log=self.log)
        try:
            self._wait(timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server with its workers; safe to call again."""
        self.process.end()
        remove_folders(self._folders)

    def _wait(self, timeout: float) -> None:
        client, deadline = JSONClient(self.url), time.monotonic() + timeout
        while True:
            try:
                client.call("/health", timeout=timeout)
                return
            except (HTTPError, SilentError, UnreachableError) as error:
                if (code := self.process.poll()) is not None:
                    what = f"ended with exit code {code} before it was ready"
                elif time.monotonic() > deadline:
                    what = f"was not ready after {timeout:.0f} s ({error})"
                else:
                    time.sleep(POLL_SECONDS)
                    continue
                raise EngineError(f"the vLLM engine {what}{end_of_log(self.log)}") from None


class ServerEngine:
    """An :class:`~opdengine.rollout.vllm.engine.Engine` that is a vLLM server.

    Requests in flight when its weights change, which other ranks may still have at a server that was started again,
    begin anew.

    Args:
        base_url: for example ``http://127.0.0.1:8000``.
        concurrency: requests in flight at a time; the server batches them.
        response_timeout: seconds for one sample or one weight update.
        own: the server, if this process has started it.
        log: file of what a server of this run prints; empty for one that somebody else has started.
    """

    replaceable = False

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int = 256,
        response_timeout: float = 3600.0,
        own: OwnServer | None = None,
        log: str = "",
    ) -> None:
        self.response_timeout = response_timeout
        self.own = own
        self._client = JSONClient(base_url, concurrency)
        self.host = self._client.host
        self._log = log
        self._closed = False
        self._vocabulary = 0
        self.name = f"the server {self._client.base_url}"

    def describe(self) -> EngineInfo:
        (answer,) = self._ask("/collective_rpc", [{"method": "describe_engine"}], DESCRIPTION_BYTES)
        try:
            fields = answer["results"][0]
            shapes = {name: tuple(shape) for name, shape in fields["shapes"].items()}
            info = EngineInfo(**{**fields, "shapes": shapes})
            _require(all(type(n) is int for shape in shapes.values() for n in shape), "shapes are no numbers")
            _require(isinstance(info.tied, Mapping), "tied is no mapping")
            for name, kind in {**dict.fromkeys(NUMBERS, int), **dict.fromkeys(TEXTS, str)}.items():
                _require(type(getattr(info, name)) is kind, f"{name} is {brief(getattr(info, name), 40)}")
            _require(info.window >= SHORTEST and info.vocabulary > 0, f"a window of {brief(info.window)} tokens")
            self._vocabulary = info.vocabulary
            return info
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._not_ours(f"it does not describe itself ({one_line(repr(error))})") from None

    def held(self) -> str:
        (answer,) = self._ask("/weight_info", [None])
        return answer.get("weight_version") if isinstance(answer, Mapping) else None  # type: ignore[return-value]

    def stamp(self, name: str) -> None:
        self._ask("/update_weight_version", [{"new_version": name}])

    def load(self, policy: StoredPolicy | None, name: str) -> None:
        stored = [] if policy is None else [policy.path, dict(policy.names), policy.low_rank]
        self._ask("/collective_rpc", [{"method": "load_policy_file", "args": stored}])
        (answer,) = self._ask(RESET, [{}])
        if not (isinstance(answer, Mapping) and answer.get("success")):
            raise EngineError(f"{self.name} did not reset its prefix cache after an update")
        self.stamp(name)

    def generate(
        self,
        prompts: Sequence[np.ndarray | PicturePrompt],
        seeds: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
    ) -> list[Sampled]:
        texts = [prompt for prompt in prompts if not isinstance(prompt, PicturePrompt)]
        if len(texts) < len(prompts):
            raise InvalidRequestError(f"no pictures are sent to {self.name}; set vllm_mode: colocate")
        bodies = [
            {"token_ids": ids.tolist(), "sampling_params": {**sampling, "seed": seed}}
            for ids, row in zip(texts, seeds, strict=True)
            for seed in row
        ]
        most = int(sampling["max_tokens"])
        return [self._read(answer, most) for answer in self._ask(GENERATE, bodies, BASE_BYTES + TOKEN_BYTES * most)]

    def sleep(self) -> None:
        """A server keeps its memory: other ranks may still sample."""

    def close(self) -> None:
        self._closed = True
        self._client.hang_up()
        if self.own is not None:
            self.own.stop()

    def _read(self, answer: Any, most: int) -> Sampled:
        """What one answer says, of at most ``most`` tokens."""
        try:
            (choice,) = answer["choices"]
            stamps = frozenset(str(span["version"]) for span in choice["weight_versions"])
            ids, reason = choice["token_ids"], choice["finish_reason"]
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            _require(isinstance(reason, str), "finish_reason is no text")
            _require(isinstance(ids, list) and all(type(i) is int for i in ids), "token_ids are no list of numbers")
            _require(all(0 <= i < self._vocabulary for i in ids), "token_ids are beyond the vocabulary")
            _require(len(ids) <= most, f"{len(ids)} tokens where {most} were asked for")
            _require(len(logprobs) == len(ids), f"{len(logprobs)} log-probs of {len(ids)} tokens")
            _require(all(type(v) in (int, float) and v <= MOST_ABOVE for v in logprobs), "what is no log-prob")
        except (KeyError, TypeError, ValueError) as error:
            raise self._not_ours(f"{GENERATE} answered {brief(answer)} ({one_line(repr(error))})") from None
        known = [v if v > NOT_A_LOGPROB else math.nan for v in logprobs]
        return Sampled(stamps, np.array(ids, dtype=np.int64), np.array(known, dtype=np.float32), reason)

    def _ask(self, path: str, bodies: Sequence[Any], limit: int = BASE_BYTES) -> list[Any]:
        """Answers in order; a server that is gone for a moment is asked again.

        A small question waits as long as any other: weights that another rank sends may be before it.
        """
        for attempt in range(1, ATTEMPTS + 2):
            if self._closed:
                raise EngineError("this sampler is closed; create a new one")
            try:
                return self._client.call_all(path, bodies, self.response_timeout, limit)
            except HTTPError as error:
                if error.status == 400:
                    raise InvalidRequestError(f"vLLM refuses: {error}") from None
                if error.status < 500:
                    raise self._not_ours(str(error)) from None
                if attempt == ATTEMPTS:
                    raise EngineError(f"the vLLM server fails: {error}{self._advice()}") from None
                logger.warning("%s; asking again", error)
            except UnreachableError as error:
                if self._closed:
                    continue
                if attempt == ATTEMPTS:
                    raise EngineDiedError(f"the vLLM server cannot be reached: {error}{self._advice()}") from None
                logger.warning("%s; asking again", error)
            except SilentError as error:
                raise EngineError(
                    f"the vLLM server hangs: {error}; raise vllm_response_timeout if the work is that large"
                    f"{self._advice()}"
                ) from None
            except GarbledError as error:
                raise self._not_ours(str(error)) from None
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _advice(self) -> str:
        """The end of an error: what to do about a server that fails."""
        if self._log:
            return f". It belongs to this run, which starts it again: {RESUME}{end_of_log(self._log)}"
        return (
            ". Its log says why, most often for lack of memory. Start it again with `opdengine vllm-serve --model "
            f"MODEL --port PORT`, then {RESUME}."
        )

    def _not_ours(self, what: str) -> EngineError:
        return EngineError(
            f"{self._client.base_url} is not a vLLM server that can be trained with: {what}. Start one with "
            "`opdengine vllm-serve --model MODEL --port PORT`."
        )


def _require(ok: bool, problem: str) -> None:
    """Raise ValueError unless ``ok``."""
    if not ok:
        raise ValueError(problem)
