"""AdamW and the learning-rate schedule are built from the settings of a run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError


def build_optimizer(config: TrainConfig, model: Any) -> torch.optim.AdamW:
    """AdamW, fused, which needs one pass over the weights and no copies of them; norms and biases are not decayed."""
    plain, decayed = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.dim() < 2 or _is_norm_or_bias(name) else decayed).append(parameter)
    if not decayed and not plain:
        raise ConfigError(
            f"the student {config.model!r} has no parameter to train (freeze_head={config.freeze_head}, "
            f"lora={config.lora}); train all of its weights, or an adapter on layers that it has"
        )
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def _is_norm_or_bias(name: str) -> bool:
    """Whether a parameter is one by its name: biases of experts, and norms of heads, are matrices in some models."""
    *_, module, last = ("", *name.split("."))
    return last.endswith("bias") or "norm" in module.lower()


def build_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, begin: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule by its transformers name.

    Args:
        config: of the run.
        optimizer: of which it sets the rate.
        begin: the step after which it begins, with its warm-up.
    """
    from transformers import get_scheduler

    steps = config.max_steps - begin
    schedule: torch.optim.lr_scheduler.LambdaLR = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(config.warmup_ratio * steps),
        num_training_steps=steps,
    )
    if begin:
        schedule.lr_lambdas = [partial(_later, rate, begin) for rate in schedule.lr_lambdas]
    return schedule


def _later(rate: Callable[[int], float], begin: int, step: int) -> float:
    return rate(max(step - begin, 0))


def restore_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, saved: Mapping[str, Any]) -> None:
    """Set a schedule, and its optimiser, to where a saved one was; the rates are those of its own settings.

    Args:
        schedule: as built for the run now.
        saved: ``state_dict`` of that of the run before.
    """
    base = schedule.base_lrs
    rates = [b * rate(saved["last_epoch"]) for b, rate in zip(base, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict({**saved, "base_lrs": base, "_last_lr": rates, "lr_lambdas": [None] * len(base)})
    # A scheduler sets the rate only when it steps, and does not when it is loaded.
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def require_updates(config: TrainConfig) -> None:
    """Raise ConfigError where the learning rate is 0 in every step, so that no weight would move."""
    rate = config.learning_rate
    if rate > 0:
        schedule = build_scheduler(config, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate))
        if any(schedule.lr_lambdas[0](step) > 0 for step in range(config.max_steps)):
            return
    raise ConfigError(
        f"learning_rate={rate} with lr_scheduler_type={config.lr_scheduler_type!r}, warmup_ratio="
        f"{config.warmup_ratio} and max_steps={config.max_steps} is 0 in every step, so nothing would be trained; "
        "raise learning_rate or max_steps, lower warmup_ratio, or measure a model with opdengine eval"
    )
