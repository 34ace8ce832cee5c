"""The three places in which vLLM may sample for a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdengine.distributed import Ranks
from opdengine.models.pictures import MOST_IMAGES
from opdengine.rollout.vllm.child import ChildEngine
from opdengine.rollout.vllm.engine import require_vllm
from opdengine.rollout.vllm.folders import private_folders
from opdengine.rollout.vllm.remote import OwnServer, ServerEngine
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.rollout.vllm.serve import is_loopback


def open_child(
    model: str,
    tokenizer: Any,
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
    start_timeout: float = 900.0,
    response_timeout: float = 3600.0,
    sees: bool = False,
    fixed: Sequence[str] = (),
) -> VLLMSampler:
    """A sampler with an engine of its own, in a child process.

    Args:
        model: model folder or hub name.
        tokenizer: decodes what was sampled.
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
        enable_sleep_mode: make :meth:`VLLMSampler.sleep` possible (GPU).
        trust_remote_code: run code that comes with the model.
        devices: CUDA_VISIBLE_DEVICES of the engine; None: the trainer's.
        cpu_threads: threads of the engine's CPU kernels; None: one less than there are cores.
        start_timeout: seconds to load the model.
        response_timeout: seconds for one call; an engine that takes longer is stopped.
        sees, fixed: see :class:`VLLMSampler`.

    Raises:
        VLLMMissingError: vLLM is not installed.
        EngineError: the engine did not start; the message holds the end of its log.
    """
    require_vllm("set use_vllm to false to sample without it")
    config: dict[str, Any] = {
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
    }
    if sees:
        config |= {"limit_mm_per_prompt": {"image": MOST_IMAGES, "video": 0}}
    folders = private_folders()
    engine = ChildEngine(config, folders, devices, cpu_threads, start_timeout, response_timeout)
    return VLLMSampler(engine, tokenizer, folders, stop_ids=stop_ids, sees=sees, fixed=fixed)


def open_server(
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
) -> VLLMSampler:
    """A sampler on a server that ``opdengine vllm-serve`` has started, and that closing leaves as it is.

    Args:
        base_url: of the server, for example ``http://127.0.0.1:8000``.
        sync_dir: folder for weight files that the server can read; None: shared memory or ``TMPDIR``
            of this machine, which a server on another machine cannot read.
        concurrency: requests in flight at a time; the server batches them.
        response_timeout: seconds for one sample or one weight update.
        tokenizer, dtype, ranks, owner, stop_ids: see :class:`VLLMSampler`.

    Raises:
        ValueError: the server is on another machine and there is no ``sync_dir``.
        EngineError, PeerError: see :class:`VLLMSampler`.
    """
    engine = ServerEngine(base_url, concurrency=concurrency, response_timeout=response_timeout)
    if sync_dir is None and not is_loopback(engine.host):
        raise ValueError(
            f"the server {base_url} is on another machine: set vllm_sync_dir to a folder that both can read"
        )
    ranks = ranks or Ranks()
    folders = private_folders(sync_dir) if ranks.rank == owner else []
    return VLLMSampler(engine, tokenizer, folders, dtype=dtype, ranks=ranks, owner=owner, stop_ids=stop_ids)


def open_shared(
    model: str,
    tokenizer: Any,
    *,
    ranks: Ranks,
    size: int,
    devices: str | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.3,
    max_num_seqs: int = 256,
    seed: int = 0,
    trust_remote_code: bool = False,
    start_timeout: float = 900.0,
    response_timeout: float = 3600.0,
    stop_ids: Sequence[int] = (),
) -> VLLMSampler:
    """A sampler on an engine that neighbouring ranks of a machine share: a server that the first of them starts.

    All ranks call this. An engine that dies is not replaced: the run ends and is resumed.

    Args:
        ranks: of the run.
        size: consecutive ranks of a machine that share an engine, and its number of GPUs.
        devices: CUDA_VISIBLE_DEVICES of this rank's engine; None: the trainer's.
        model, tokenizer, dtype, max_model_len, gpu_memory_utilization, max_num_seqs, seed, trust_remote_code,
            stop_ids, start_timeout, response_timeout: see :func:`open_child`.

    Raises:
        VLLMMissingError, EngineError: see :func:`open_child`.
        PeerError: the engine of another group did not start.
    """
    owner = ranks.rank - ranks.local_rank % size
    settings = ["--tensor-parallel-size", size, "--max-num-seqs", max_num_seqs, "--seed", seed]
    settings += ["--gpu-memory-utilization", gpu_memory_utilization]
    settings += ["--trust-remote-code"] if trust_remote_code else []
    own: OwnServer | None = None
    try:
        with ranks.agree():
            require_vllm("set use_vllm to false to sample without it")
            if ranks.rank == owner:
                own = OwnServer(model, dtype, max_model_len, list(map(str, settings)), devices, start_timeout)
        url, log = ranks.gather((own.url, own.log) if own else ("", ""))[owner]
    except BaseException:
        if own is not None:
            own.stop()
        raise
    engine = ServerEngine(url, response_timeout=response_timeout, own=own, log=log)
    folders = private_folders() if ranks.rank == owner else []
    return VLLMSampler(engine, tokenizer, folders, dtype=dtype, ranks=ranks, owner=owner, stop_ids=stop_ids)
