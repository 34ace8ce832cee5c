"""Sampling from a separate vLLM server, whose weights the trainer replaces (``vllm_mode: server``).

The server is started by ``opdengine vllm-serve`` and may have GPUs of its own. Requests and answers
are token ids over HTTP; weights go through a file that both can read, in shared memory if possible.

Several ranks may sample from one server at a time. One of them owns it: it alone writes and sends weights.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from opdengine.distributed import Ranks
from opdengine.models.chat import text_of_completion
from opdengine.rollout.engine_process import EngineDiedError, EngineError, InvalidRequestError
from opdengine.rollout.http_client import GarbledError, HTTPError, JSONClient, SilentError, UnreachableError
from opdengine.rollout.policy_file import StoredPolicy
from opdengine.rollout.vllm_base import Sample, VLLMBase, private_folders, remove_folders
from opdengine.rollout.vllm_extension import EngineInfo
from opdengine.rollout.vllm_server import is_loopback
from opdengine.workers.printing import brief, one_line

if TYPE_CHECKING:
    import torch

    from opdengine.models.lora import LowRank

T = TypeVar("T")

logger = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
RESET = "/reset_prefix_cache?reset_running_requests=true"
NO_STAMP = "none"
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
PAUSE_SECONDS = 1.0
PROBE_BOUND = {"float32": 1e-3}
RESUME = "continue the run with --resume_from_checkpoint latest"


class VLLMServerSampler(VLLMBase):
    """A :class:`~opdengine.rollout.Sampler` on a vLLM server.

    Every update stamps the server's weights with a name of its own, and every answer carries that
    name: it comes off before the weights change and on when they are all there. A server that was started
    again has forgotten it: it is given the last policy, one time per call, and asked again
    (:attr:`restarts` counts). Any rank may do that, since it only names the files.

    With several ranks, all create the sampler and all call :meth:`load_policy`, in the same order;
    each calls :meth:`generate` as often as it likes in between.

    Args:
        base_url: of the server, for example ``http://127.0.0.1:8000``.
        tokenizer: decodes what was sampled.
        dtype: that the server must compute in; "auto" accepts any.
        sync_dir: folder for weight files that the server can read; None: shared memory or ``TMPDIR``
            of this machine, which a server on another machine cannot read.
        concurrency: requests in flight at a time; the server batches them.
        response_timeout: seconds for one sample or one weight update.
        ranks: that take part in updates.
        owner: the rank that sends weights to this server.
        stop_ids: tokens that end a completion, beside those that vLLM reads from the model's files.

    Raises:
        EngineError: there is no server, or not one that :func:`opdengine.rollout.vllm_server.serve`
            started.
        PeerError: another rank found that.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: Any,
        *,
        dtype: str = "auto",
        sync_dir: str | None = None,
        concurrency: int = 256,
        response_timeout: float = 3600.0,
        ranks: Ranks | None = None,
        owner: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self._client = JSONClient(base_url, concurrency)
        if sync_dir is None and not is_loopback(self._client.host):
            raise ValueError(
                f"the server {base_url} is on another machine: set vllm_sync_dir to a folder that both can read"
            )
        self.tokenizer = tokenizer
        self.restarts = 0
        self.response_timeout = response_timeout
        self._closed = False
        self._ranks, self._owner = ranks or Ranks(), owner
        self._name = self._shared(secrets.token_hex(4))
        super().__init__(private_folders(sync_dir) if self._owns else (), stop_ids)
        self.policy_version = -1  # whatever the server holds, it is not known to be the trainer's
        self._finalizer = weakref.finalize(self, _clean, os.getpid(), self._folders)
        try:
            with self._ranks.agree():
                self.info = self._describe()
                self._check(dtype)
                if self._owns:
                    self._dry_sync()
        except BaseException:
            self.close()
            raise

    def load_policy(
        self, version: int, weights: Iterable[tuple[str, torch.Tensor]], low_rank: LowRank | None = None
    ) -> None:
        """See :class:`VLLMBase`. All ranks call this when none of them samples; the owner sends the weights.

        Raises:
            PeerError: it failed on another rank.
        """
        with self._lock:
            self._ranks.settle()  # nobody samples any more
            with self._ranks.agree():
                if self._owns:
                    super().load_policy(version, weights, low_rank)
                else:
                    for _ in self._to_read(weights, low_rank):
                        pass
            self._policy, self.policy_version = self._shared(self._policy), version

    def sleep(self) -> None:
        """A server keeps its memory."""

    def close(self) -> None:
        """End a call in flight and delete the weight files; the server goes on running."""
        self._closed = True
        self._client.hang_up()
        self._finalizer()

    def _sample(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], sampling: Mapping[str, Any]
    ) -> tuple[int, list[Sample]]:
        bodies = [
            {
                "token_ids": ids.tolist(),
                "sampling_params": {
                    **sampling,
                    "n": 1,
                    "seed": seed,
                    "logprobs": 0,
                    "detokenize": bool(sampling["stop"]),
                    "skip_special_tokens": False,
                },
            }
            for ids, row in zip(prompts, seeds, strict=True)
            for seed in row
        ]
        for attempt in (1, 2):
            self._restore()
            most = int(sampling["max_tokens"])
            answers = self._ask(GENERATE, bodies, BASE_BYTES + TOKEN_BYTES * most)
            read = [self._read(answer, most) for answer in answers]
            stamps = {stamp for found, *_ in read for stamp in found}
            if stamps == {self._stamp}:
                break
            if attempt == 2:
                raise EngineError(
                    f"the server {self._client.base_url} answered with weights {brief(sorted(stamps))} instead of "
                    f"version {self.policy_version}; does another run update the same server?"
                )
        samples = [
            (ids, logprobs, reason, text_of_completion(self.tokenizer, ids.tolist(), self.stop_ids))
            for _, ids, logprobs, reason in read
        ]
        return self.policy_version, samples

    def _read(self, answer: Any, most: int) -> tuple[set[str], np.ndarray, np.ndarray, str]:
        """Names of the weights that one answer was sampled with, token ids (at most ``most``), log-probs, its end."""
        try:
            (choice,) = answer["choices"]
            stamps = {str(span["version"]) for span in choice["weight_versions"]}
            ids, reason = choice["token_ids"], choice["finish_reason"]
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            _require(isinstance(reason, str), "finish_reason is no text")
            _require(isinstance(ids, list) and all(type(i) is int for i in ids), "token_ids are no list of numbers")
            _require(all(0 <= i < self.info.vocabulary for i in ids), "token_ids are beyond the vocabulary")
            _require(len(ids) <= most, f"{len(ids)} tokens where {most} were asked for")
            _require(len(logprobs) == len(ids), f"{len(logprobs)} log-probs of {len(ids)} tokens")
            _require(all(type(v) in (int, float) and v <= MOST_ABOVE for v in logprobs), "what is no log-prob")
        except (KeyError, TypeError, ValueError) as error:
            raise self._not_ours(f"{GENERATE} answered {brief(answer)} ({one_line(repr(error))})") from None
        known = [v if v > NOT_A_LOGPROB else math.nan for v in logprobs]
        return stamps, np.array(ids, dtype=np.int64), np.array(known, dtype=np.float32), reason

    @property
    def _owns(self) -> bool:
        return self._ranks.rank == self._owner

    @property
    def _stamp(self) -> str:
        """The server's name for the weights of :attr:`policy_version`."""
        return f"{self._name}-{self.policy_version}"

    def _shared(self, value: T) -> T:
        """The owner's value, on all ranks."""
        return self._ranks.gather(value)[self._owner]

    def _load(self, policy: StoredPolicy) -> None:
        self._set_stamp(NO_STAMP)
        self._push(policy.version, policy)

    def _push(self, version: int, policy: StoredPolicy | None) -> None:
        """Weights, then prefix cache, then the stamp: an answer with the stamp used the weights.

        Requests in flight, which other ranks may still have at a server that was started again, begin anew.
        """
        stored = [] if policy is None else [policy.path, dict(policy.names), policy.low_rank]
        update = {"method": "load_policy_file", "args": stored}
        self._ask("/collective_rpc", [update])
        (answer,) = self._ask(RESET, [{}])
        if not (isinstance(answer, Mapping) and answer.get("success")):
            raise EngineError(f"the server {self._client.base_url} did not reset its prefix cache after an update")
        self._set_stamp(f"{self._name}-{version}")

    def _set_stamp(self, stamp: str) -> None:
        self._ask("/update_weight_version", [{"new_version": stamp}])

    def _distrust(self) -> None:
        """Nothing to do: the server's own stamp says what it holds."""

    def _restore(self) -> None:
        """Give the last policy to a server that holds something else."""
        (answer,) = self._ask("/weight_info", [None])
        held = answer.get("weight_version") if isinstance(answer, Mapping) else None
        if held == self._stamp:
            return
        self.restarts += 1
        logger.warning(
            "the server %s holds the weights %s instead of version %d: giving them back; was it started again?",
            *(self._client.base_url, brief(held), self.policy_version),
        )
        self._push(self.policy_version, self._policy)

    def _describe(self) -> EngineInfo:
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
            return info
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._not_ours(f"it does not describe itself ({one_line(repr(error))})") from None

    def _check(self, dtype: str) -> None:
        if self.info.logprobs_mode.rpartition(".")[2].lower() != "processed_logprobs":
            raise self._not_ours(f"its logprobs_mode is {self.info.logprobs_mode}, not processed_logprobs")
        if dtype != "auto" and dtype != self.info.dtype:
            raise ValueError(
                f"the server {self._client.base_url} computes in {self.info.dtype}, the trainer in {dtype}; start it "
                f"with --dtype {dtype}"
            )

    def _dry_sync(self) -> None:
        """Reload the server's checkpoint as an update would be and see that no log-prob changes."""
        count = min(16, self.info.window - 4)
        ids = np.array([(7919 * i + 1) % self.info.vocabulary for i in range(count)])
        sampling = {"max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}

        def probe() -> np.ndarray:
            return self._sample([ids], [[0]], {**sampling, "stop": []})[1][0][1]

        self._push(self.policy_version, None)  # whatever an earlier run has left there is gone
        before = probe()
        self._push(self.policy_version, None)
        after = probe()
        bound = PROBE_BOUND.get(self.info.dtype, 0.1)
        if before.shape != after.shape or not float(np.abs(after - before).max()) <= bound:
            raise EngineError(
                f"reloading its own checkpoint changed the log-probs of the server {self._client.base_url} (bound "
                f"{bound}); this architecture or quantisation cannot be updated in place"
            )

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


def _clean(owner: int, folders: Sequence[str]) -> None:
    if os.getpid() == owner:
        remove_folders(folders)
