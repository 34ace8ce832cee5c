"""Forward and backward over the micro-batches of a step, and what the optimiser step needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from opdengine.loss.objective import LossOf, advantage, kl_weight
from opdengine.models.backbone import Backbone
from opdengine.models.packing import ONE_REGIME, Packed, Regimes, pack
from opdengine.models.sharding import whole
from opdengine.types import Sample


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of the student.

    Args:
        packed: the sequences of the pass; None where other processes have a micro-batch and this one has none.
        samples: in the order of their targets.
        positions: for each sequence of ``packed``, int64 the positions of its targets.
    """

    packed: Packed | None = None
    samples: tuple[Sample, ...] = ()
    positions: tuple[np.ndarray, ...] = ()


def micro_batches(
    samples: Sequence[Sample],
    max_tokens: int,
    layout: str,
    regimes: Regimes = ONE_REGIME,
    image_layout: str = "alone",
) -> list[MicroBatch]:
    """Cut the samples of a step into micro-batches; loss and gradient do not depend on how.

    The steps of one trajectory share one sequence, so the student reads each trajectory once.

    Args:
        samples: of this process.
        max_tokens: budget of a micro-batch.
        layout, regimes, image_layout: see :func:`opdengine.models.packing.pack`.

    Raises:
        ValueError: a step's ids are not a prefix of its trajectory's; names the sample.
    """
    groups: dict[str, list[Sample]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.trajectory or f"\0{i}", []).append(sample)
    trajectories = list(groups.values())
    longest_of = [max(members, key=lambda sample: len(sample.token_ids)) for members in trajectories]
    sequences = [sample.token_ids for sample in longest_of]
    packed_batches = pack(
        sequences,
        max_tokens=max_tokens,
        layout=layout,
        regimes=regimes,
        images=[sample.images for sample in longest_of],
        image_layout=image_layout,
    )
    for members, longest in zip(trajectories, sequences, strict=True):
        for sample in members:
            if not np.array_equal(sample.token_ids, longest[: len(sample.token_ids)]):
                raise ValueError(
                    f"sample {sample.id!r} is no prefix of its trajectory {sample.trajectory!r}; "
                    "steps must keep the exact token ids"
                )
    return [
        MicroBatch(
            packed,
            tuple(sample for i in packed.members for sample in trajectories[i]),
            tuple(np.concatenate([sample.target_positions for sample in trajectories[i]]) for i in packed.members),
        )
        for packed in packed_batches
    ]


def backward(student: Backbone, batches: Iterable[MicroBatch], loss_of: LossOf) -> list[float]:
    """Add the gradients of all micro-batches to the student's parameters.

    Args:
        student: in training mode.
        batches: of this process; one that has fewer than others takes part in theirs.
        loss_of: their part of the loss; a process without a micro-batch calls it with no samples.

    Returns:
        This process's part of the loss of each micro-batch.
    """

    def run(batch: MicroBatch) -> torch.Tensor:
        if batch.packed is None:
            hidden = student.idle()
            return student.without_tokens(hidden) + loss_of(hidden[:0], [])
        return loss_of(student.hidden(batch.packed, batch.positions), batch.samples)

    losses, batches = [], list(batches)
    for batch in student.in_step(batches):
        loss = student.with_weights(partial(run, batch or MicroBatch()))
        loss.backward()
        losses.append(loss.item())
    student.leave_tower(any(batch.packed is not None and batch.packed.images for batch in batches))
    return losses


def gradient_norm(model: Any) -> float:
    """2-norm of the whole gradient, over all ranks."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(whole(torch.nn.utils.get_total_norm(gradients)))


def clip_gradients(model: Any, max_norm: float, norm: float) -> None:
    """Scale the gradients down so that their norm, which is ``norm``, is at most ``max_norm``."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm, device=parameters[0].device))


def some_values(model: Any, count: int = 256) -> torch.Tensor:
    """Up to ``count`` values of every trained parameter (of this rank's part), to see whether an update moves any."""
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = parameter.detach()
            flat = (own.to_local() if hasattr(own, "to_local") else own).reshape(-1)
            found.append(flat[:: max(1, flat.numel() // count)][:count].float())
    return torch.cat(found)


def describe(batches: Sequence[MicroBatch], losses: Sequence[float]) -> list[dict[str, object]]:
    """Everything that entered a step whose loss or gradient was not finite, one record per sample."""
    return [
        {
            "id": sample.id,
            "prompt_id": sample.prompt.id,
            "loss_of_micro_batch": loss,
            "finite": bool(np.isfinite(loss)),
            "teachers": list(sample.teachers),
            "kl_weight": kl_weight(sample).tolist(),
            "divergence_kind": None if sample.divergence_kind is None else sample.divergence_kind.tolist(),
            "mix": sample.token_mix(len(sample.teachers)).tolist(),
            "advantage": None if sample.advantage is None else advantage(sample).tolist(),
            "token_ids": sample.token_ids.tolist(),
            "text": sample.text,
        }
        for batch, loss in zip(batches, losses, strict=False)  # a process may have run others' micro-batches, too
        for sample in batch.samples
    ]
