"""What a step has to say: collected on every rank, merged, and turned into metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from opdengine.distributed import Ranks
from opdengine.loss.statistics import Tally
from opdengine.methods.method import Annotations, Note
from opdengine.metrics import merge
from opdengine.types import Rollout


class Clock(dict[str, float]):
    """Wall seconds by phase."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[phase] = self.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Prepared:
    """This rank's share of a batch that is ready for the update: what came of the rollouts and the debate.

    Args:
        rollouts: of the batch, each with the version of the policy that sampled it.
        notes: one per rollout.
        found: all that the annotator returned.
        metrics: so far.
        clock: seconds so far.
        dropped: rollouts that were lost before the scores, by reason.
        number: of the batch.
    """

    rollouts: Sequence[Rollout]
    notes: Sequence[Note]
    found: Annotations
    metrics: dict[str, float]
    clock: Clock
    dropped: Counter[str] = field(default_factory=Counter)
    number: int = 0


@dataclass
class StepResult:
    """What one step did, on all ranks.

    Args:
        metrics: of the step.
        rollouts: of the step.
        records: of the annotator.
        bad: one record per rollout of a step whose loss or gradient was not finite; else empty.
    """

    metrics: dict[str, float]
    rollouts: Sequence[Rollout] = ()
    records: Sequence[Mapping[str, object]] = ()
    bad: Sequence[Mapping[str, object]] = ()


def merge_ranks(ranks: Ranks, prepared: Prepared, kept: int) -> tuple[dict[str, float], list[Mapping[str, object]]]:
    """Metrics that were counted on each rank, and the annotator's records, of all ranks.

    Args:
        ranks: of the run.
        prepared: of this rank, complete.
        kept: rollouts of this rank that are part of the loss.
    """
    dropped = {f"dropped/{reason}": float(count) for reason, count in prepared.dropped.items()}
    counted = {**prepared.metrics, **dropped, "completions/kept": float(kept)}
    parts = ranks.gather((counted, dict(prepared.clock), list(prepared.found.records)))
    metrics = merge([part for part, _, _ in parts])
    phases = {phase for _, clock, _ in parts for phase in clock}
    seconds = {phase: max(clock.get(phase, 0.0) for _, clock, _ in parts) for phase in sorted(phases)}
    metrics |= {f"timing/{phase}": value for phase, value in seconds.items()}
    return metrics, [record for _, _, records in parts for record in records]


def summarise(rollouts: Sequence[Rollout], tally: Tally) -> dict[str, float]:
    """Metrics of a whole step from its rollouts and the statistics of the loss."""
    metrics = tally.means("teacher_kl/") | tally.means("student_entropy")
    rewards = [r.reward for r in rollouts if r.reward is not None]
    if rewards:
        metrics["reward/mean"] = float(np.mean(rewards))
    gap = tally.get("gap")
    if len(gap):
        metrics["gap/mean"] = float(gap.mean())
        metrics["gap/p95"] = float(np.quantile(np.abs(gap), 0.95))
    lengths = [len(r.targets) for r in rollouts]
    clipped = [r.is_clipped for r in rollouts]
    metrics["completions/mean_length"] = float(np.mean(lengths)) if lengths else 0.0
    metrics["completions/clipped_ratio"] = float(np.mean(clipped)) if clipped else 0.0
    return metrics
