"""Forward, backward and the optimiser step over all micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from opdengine.distributed import whole
from opdengine.loss.objective import Item, fold
from opdengine.models.backbone import Backbone
from opdengine.models.packing import Packed, pack

LossOf = Callable[[torch.Tensor, Sequence[Item]], torch.Tensor]
"""(hidden states [T, d] of the items' targets, items) -> this rank's part of the loss."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch that has been run: its items and this rank's part of the loss."""

    items: Sequence[Item]
    loss: float


def backward(
    student: Backbone,
    items: Sequence[Item],
    loss_of: LossOf,
    max_tokens: int,
) -> list[Micro]:
    """Add the gradients of all items to the student's parameters.

    Args:
        student: in training mode.
        items: of this rank; ranks that have fewer micro-batches than others take part in theirs.
        loss_of: their part of the loss; ranks without a micro-batch call it with no items.
        max_tokens: budget of a micro-batch.
    """
    strands = fold(items)
    done = []

    def run(batch: Packed, members: Sequence[Item]) -> torch.Tensor:
        return loss_of(student.hidden(batch, [strands[i].target_positions for i in batch.members]), members)

    def idle() -> torch.Tensor:
        hidden = student.idle()
        return student.nothing(hidden) + loss_of(hidden[:0], [])

    sequences = [strand.token_ids for strand in strands]
    for batch in student.in_step(pack(sequences, max_tokens=max_tokens, layout=student.layout)):
        members = [] if batch is None else [item for i in batch.members for item in strands[i].items]
        loss = student.within(idle if batch is None else partial(run, batch, members))
        loss.backward()
        done.append(Micro(members, loss.item()))
    return done


def gradient_norm(model: Any) -> float:
    """2-norm of the whole gradient, over all ranks."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(whole(torch.nn.utils.get_total_norm(gradients)))


def clip_gradients(model: Any, max_norm: float, norm: float) -> None:
    """Scale the gradients down so that their norm, which is ``norm``, is at most ``max_norm``."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm, device=parameters[0].device))


def describe(micro: Sequence[Micro]) -> list[dict[str, object]]:
    """Everything that entered a step whose loss or gradient was not finite, one record per rollout."""
    return [
        {
            "id": item.rollout.id,
            "prompt_id": item.rollout.prompt.id,
            "loss_of_micro_batch": part.loss,
            "finite": bool(np.isfinite(part.loss)),
            "teachers": list(item.teachers),
            "kl_weight": item.kl_weight.tolist(),
            "mix": item.mix.tolist(),
            "advantage": None if item.advantage is None else np.asarray(item.advantage).tolist(),
            "token_ids": item.rollout.token_ids.tolist(),
            "text": item.rollout.text,
        }
        for part in micro
        for item in part.items
    ]
