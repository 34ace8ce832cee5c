"""From a configuration to the student's sampler: vLLM in a child, shared or served, or transformers."""

from __future__ import annotations

import os
from typing import Any

import torch

from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.models.chat import stop_token_ids
from opdengine.models.lora import architecture, base_of
from opdengine.models.vision_tower import tower
from opdengine.rollout import Sampler
from opdengine.rollout.vllm.weight_names import find_naming
from opdengine.training.build_student import load_copy, longest_sequence


def build_sampler(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    ranks: Ranks | None = None,
    vocab_size: int | None = None,
    sees: bool = False,
) -> Sampler:
    """The student's sampler: vLLM where asked, else the trainer's own model, or a copy where that is split.

    The trainer's own model samples the first ``vocab_size`` ids alone; default: all of the tokenizer's. ``sees``:
    the model was loaded with its tower, and so is a copy of it.
    """
    ranks = ranks or Ranks()
    if config.use_vllm:
        return _open_vllm(config, model, tokenizer, ranks, sees)
    from opdengine.rollout.transformers import TransformersSampler

    sampled = base_of(model)
    if ranks.world_size > 1:
        sampled = ranks.in_turn(lambda: load_copy(config, sees))
    sampler = TransformersSampler(
        sampled, tokenizer, 4 * config.max_tokens_per_batch, config.bf16, config.chat_template_kwargs
    )
    sampler.vocabulary = vocab_size or sampler.vocabulary
    sampler.prove()
    return sampler


def _open_vllm(config: TrainConfig, model: Any, tokenizer: Any, ranks: Ranks, sees: bool) -> Sampler:
    """A server that runs already, an engine that neighbouring ranks share, or a child of this process."""
    from opdengine.rollout.vllm.opening import open_child, open_server, open_shared

    source, size = architecture(config.model), config.vllm_tensor_parallel_size
    find_naming(source, config.trust_remote_code, sees)  # refuses before an engine starts
    common: dict[str, Any] = {
        # Under autocast the trainer's own forward pass is bfloat16 as well.
        "dtype": "bfloat16" if config.bf16 else str(model.dtype).removeprefix("torch."),
        "response_timeout": config.vllm_response_timeout,
        "stop_ids": stop_token_ids(tokenizer, model, config.chat_template_kwargs),
    }
    if config.vllm_mode == "server":
        address = config.vllm_server_base_url
        return open_server(address, tokenizer, sync_dir=config.vllm_sync_dir, ranks=ranks, **common)
    common |= {
        "max_model_len": longest_sequence(config),
        "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
        "seed": config.seed,
        "trust_remote_code": config.trust_remote_code,
    }
    if ranks.world_size > 1 and size > 1:
        return open_shared(source, tokenizer, ranks=ranks, size=size, devices=_gpus(ranks, size), **common)
    return open_child(
        source,
        tokenizer,
        tensor_parallel_size=size,
        enable_sleep_mode=config.vllm_enable_sleep_mode,
        devices=_gpus(ranks, 1),
        sees=sees,
        fixed=_fixed_weights(config, model) if sees else [],
        **common,
    )


def _fixed_weights(config: TrainConfig, model: Any) -> list[str]:
    """Beginnings of the names of weights that stay those of the checkpoint which an engine loads: a frozen tower's."""
    if not config.freeze_vision_tower or architecture(config.model) != config.model:  # an adapter may have moved it
        return []
    return [f"{name}." for name, _ in tower(base_of(model))]


def _gpus(ranks: Ranks, size: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of the engine of this rank's group of ``size`` neighbours; None: this process's."""
    if ranks.world_size == 1 or not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(ranks.local_world_size)]
    first = ranks.local_rank - ranks.local_rank % size
    return ",".join(names[first : first + size])
