"""From a configuration to the student: its dtype, its weights, its adapter, and how long its sequences may be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.models.backbone import choose_attention, default_device, load_model, read_dtype, read_window
from opdengine.models.given import is_given
from opdengine.models.lora import add_adapter, freeze_head, load_adapter
from opdengine.models.quantised import keep_layout
from opdengine.models.vision_tower import freeze_vision_tower, vision_layers

logger = logging.getLogger(__name__)

NO_FLOAT16 = (
    "gives the student float16 parameters, in which AdamW breaks down; set dtype: float32 (and bf16: true on a GPU "
    "that has it)"
)


def student_dtype(config: TrainConfig) -> str:
    """The dtype of the student's parameters: for "auto" the checkpoint's, or float32 where that is float16.

    Reads no weights.

    Raises:
        ConfigError: float16 was asked for.
    """
    if config.dtype == "float16":
        raise ConfigError(f"dtype='float16' {NO_FLOAT16}")
    if config.dtype != "auto":
        return config.dtype
    stored = read_dtype(config.model, trust_remote_code=config.trust_remote_code)
    return "float32" if stored == torch.float16 else "auto"


def load_student(
    config: TrainConfig,
    device: torch.device,
    checkpoint: Path | None = None,
    on_host: bool = False,
    sees: bool = False,
) -> Any:
    """The student as it is trained: its own weights, or an adapter on them.

    Args:
        config: of the run.
        device: where it will compute.
        checkpoint: take the weights from here.
        on_host: leave it on the CPU, to be split.
        sees: whether it is given pictures.

    Raises:
        ConfigError: float16 was asked for, or an adapter does not fit.
    """
    saved = None if checkpoint is None else checkpoint / "model"
    dtype = student_dtype(config)
    if dtype != config.dtype:
        logger.info("%s is stored in float16, in which AdamW breaks down: it is trained in float32", config.model)
    given_whole = is_given(config.model) and config.lora is None
    model = load_model(
        config.model if saved is None or config.lora is not None or given_whole else str(saved),
        dtype=dtype,
        attn_implementation=choose_attention(config.attn_implementation, device),
        trust_remote_code=config.trust_remote_code,
        device="cpu" if on_host else device,
        bf16=config.bf16,
        sees=sees,
    )
    keep_layout(model)
    if model.dtype == torch.float16:  # its configuration did not say so
        raise ConfigError(f"dtype={config.dtype!r} {NO_FLOAT16}")
    if model.dtype == torch.bfloat16 and config.lora is None:
        logger.warning(
            "the student's parameters are bfloat16: updates of less than about 1/256 of a weight are lost, which with "
            "learning_rate=%g is the fate of most (the metric weights_moved is the share that a step moves); "
            "dtype: float32 with bf16: true keeps them",
            config.learning_rate,
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.freeze_head:
        freeze_head(model)
    if saved is not None and given_whole:
        stored = load_model(str(saved), dtype=dtype, trust_remote_code=config.trust_remote_code, sees=sees)
        model.load_state_dict(stored.state_dict())
    if config.freeze_vision_tower:
        freeze_vision_tower(model)
    if config.lora is None:
        return model
    if saved is not None:
        return load_adapter(model, saved)
    return add_adapter(model, config.lora, vision_layers(model) if config.freeze_vision_tower else ())


def load_copy(config: TrainConfig, sees: bool = False) -> Any:
    """The student for sampling alone: where the trained one is split, or nothing is trained."""
    model = load_model(
        config.model,
        dtype=student_dtype(config),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        device=default_device(),
        bf16=config.bf16,
        sees=sees,
    ).requires_grad_(False)
    keep_layout(model)
    if config.bf16:
        halve_products(model)
    return model


def halve_products(model: Any) -> None:
    """Keep weights of linear layers in bfloat16, as autocast casts them in every pass: the results stay the same."""
    embedding = model.get_input_embeddings().weight
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight is not embedding:
            layer.to(torch.bfloat16)


def longest_sequence(config: TrainConfig) -> int | None:
    """Most tokens of one sequence of the student; None is unbounded. vLLM refuses more than the model's window."""
    longest: int | None = config.max_prompt_length + config.max_completion_length
    if config.environment.name:
        longest = config.environment.max_trajectory_tokens
    window = read_window(config.model, trust_remote_code=config.trust_remote_code)
    return min((limit for limit in (longest, window) if limit is not None), default=None)


def check_switch(config: TrainConfig, switch: int | None) -> None:
    """Raise ConfigError where a rollout could pass the length at which the student's position encoding changes.

    Its first tokens would be sampled from one model, and be trained as those of another.
    """
    longest = longest_sequence(config)
    if switch is None or (longest is not None and longest <= switch):
        return
    settings = "max_prompt_length + max_completion_length"
    raise ConfigError(
        f"the student's position encoding is another one in sequences of more than {switch} tokens "
        "(original_max_position_embeddings of LongRoPE), so what a longer rollout was sampled from is not what is "
        f"trained: set {'environment.max_trajectory_tokens' if config.environment.name else settings} to at most "
        f"{switch} (now {longest}), or use another student"
    )
