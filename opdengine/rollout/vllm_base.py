"""What every way of running vLLM shares: checks, seeds, weight files and version stamps."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from opdengine.rollout.engine_process import EngineError
from opdengine.rollout.policy_file import StoredPolicy, check_low_rank, collect_policy, pack_low_rank, write_policy
from opdengine.rollout.transformers import check_room, stream_key
from opdengine.rollout.vllm_extension import EngineInfo
from opdengine.types import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from typing import Self

    import torch

    from opdengine.models.lora import LowRank

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0

PREFIX, LOCK = "opdengine-vllm-", ".lock"
_locks: dict[str, IO[str]] = {}

Sample = tuple[np.ndarray, np.ndarray, str, str]
"""Token ids, log-probs, reason of the end, text."""


class VLLMBase(ABC):
    """A :class:`~opdengine.rollout.Sampler` on some running vLLM engine.

    The last policy is kept as a file until the next one is loaded, so that an engine that was
    started again can be given it. Calls take turns; they may come from several threads.

    Args:
        folders: for weight files, best first; the engine must be able to read them.
        stop_ids: tokens that end a completion, beside those that vLLM reads from the model's files.
    """

    info: EngineInfo

    def __init__(self, folders: Sequence[str], stop_ids: Sequence[int] = ()) -> None:
        self.policy_version = 0
        self.stop_ids = tuple(stop_ids)
        self._folders = list(folders)
        self._policy: StoredPolicy | None = None
        self._lock = threading.RLock()

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
        prompts = [self._prompt_ids(request, params.max_tokens) for request in requests]
        if not prompts:
            return []
        seeds = [[_seed(params, r, i) for i in range(params.n)] for r in requests]
        sampling = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "repetition_penalty": params.repetition_penalty,
            "stop": list(params.stop),
            "stop_token_ids": list(self.stop_ids),
        }
        with self._lock:
            version, samples = self._sample(prompts, seeds, sampling)
            if version != self.policy_version:
                self._distrust()
                raise EngineError(
                    f"the engine sampled with policy {version} instead of {self.policy_version}; "
                    "nothing was returned, and the next call reloads the policy"
                )
        completions = [_completion(sample) for sample in samples]
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
            left = self._to_read(weights, low_rank)
            try:
                policy, last = self._store(version, left, low_rank), self._policy
            finally:
                for _ in left:  # also after an error
                    pass
            try:
                self._load(policy)
            except BaseException:
                # Whether the new weights arrived is unknown: start again from the last known.
                self._distrust()
                _remove(policy, last)
                raise
            self._policy, self.policy_version = policy, version
            _remove(last, policy)

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; safe to call again and from another thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _sample(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], sampling: Mapping[str, Any]
    ) -> tuple[int, list[Sample]]:
        """One sample per (prompt, seed), prompts outermost, and the version that they come from."""

    @abstractmethod
    def _load(self, policy: StoredPolicy) -> None:
        """Replace the engine's weights and reset its prefix cache."""

    @abstractmethod
    def _distrust(self) -> None:
        """The engine's weights are unknown: give it the last policy before it samples again."""

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
        return iter(() if self._stored_base(low_rank) else weights)

    def _stored_base(self, low_rank: LowRank | None) -> StoredPolicy | None:
        """What the next policy shares with the last one, so that its weights are not read again."""
        last = self._policy
        return last if low_rank is not None and last is not None and last.low_rank is not None else None

    def _store_whole(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> StoredPolicy:
        tensors, names = collect_policy(weights, self.info.shapes, self.info.tied)
        return StoredPolicy(version, self._write(version, tensors), names)

    def _write(self, version: int, tensors: Mapping[str, Any]) -> str:
        path = self._new_file(version, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        try:
            write_policy(tensors, path)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
        return path

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

    def _new_file(self, version: int, size: int) -> str:
        """A path with room for ``size`` bytes: in memory if possible."""
        for folder in self._folders:
            if shutil.disk_usage(folder).free > size * 1.05 + (1 << 20):
                return str(Path(folder) / f"policy-{version}-{time.monotonic_ns()}.safetensors")
        raise OSError(
            f"no room for a policy of {size / 2**30:.2f} GiB beside the last one in any of "
            f"{self._folders}; free some, or set TMPDIR to a larger disk"
        )


def _remove(policy: StoredPolicy | None, keep: StoredPolicy | None) -> None:
    """Delete the files of one policy that another does not share."""
    for path in (policy.files if policy else set()) - (keep.files if keep else set()):
        Path(path).unlink(missing_ok=True)


def private_folders(base: str | None = None) -> list[str]:
    """New folders for weight files, best first; the last one also takes logs.

    Args:
        base: make one folder here; None: in shared memory if there is any, and in ``TMPDIR``.
    """
    bases = [base or tempfile.gettempdir()]
    if base is None and os.access("/dev/shm", os.W_OK):
        bases.insert(0, "/dev/shm")
    for folder in bases:
        _sweep(folder)
    return [_lock_folder(tempfile.mkdtemp(prefix=PREFIX, dir=folder)) for folder in bases]


def remove_folders(folders: Iterable[str]) -> None:
    """Undo :func:`private_folders`."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        _locks.pop(folder, None)


def _lock_folder(folder: str) -> str:
    """Hold a lock in the folder for as long as this process lives."""
    lock = open(Path(folder) / "new", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    (Path(folder) / "new").rename(Path(folder) / LOCK)
    _locks[folder] = lock
    return folder


def _sweep(base: str) -> None:
    """Remove what processes that were killed have left: folders whose lock nobody holds."""
    for lock in Path(base).glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:
            pass  # in use, gone, or of another user


def _completion(sample: Sample) -> Completion:
    token_ids, logprobs, reason, text = sample
    if token_ids.shape != logprobs.shape or not np.isfinite(logprobs).all():
        raise EngineError(
            f"the engine returned {len(token_ids)} tokens with log-probs {logprobs}; "
            "the policy's weights may hold NaN or infinity"
        )
    if reason not in ("stop", "length"):
        raise EngineError(f"the engine ended a completion with reason {reason!r}")
    return Completion(token_ids, logprobs, reason, text)


def _seed(params: SamplingParams, request: Request, index: int) -> int:
    return stream_key(params.seed, request.seed, index) >> 1  # vLLM's seeds are signed


def _check_temperature(temperature: float) -> None:
    possible = temperature == 0 or LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE
    if not possible:
        raise ValueError(
            f"vLLM cannot sample at temperature {temperature} (it would use another one); use 0 or "
            f"{LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"
        )
