"""The metrics and records of a step are merged over all processes here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opdengine.distributed import Ranks
from opdengine.loss.statistics import Statistics
from opdengine.metrics import mean, merge
from opdengine.training.rollout_log import completion_row
from opdengine.training.token_log import Arrays, token_arrays
from opdengine.types import Batch, Sample


@dataclass
class StepResult:
    """The metrics, samples and records of one step.

    Args:
        metrics: of the step, over all processes.
        samples: of this process.
        records: debates and verdicts, of all processes.
        completions: rows for the log of what was sampled, of all processes; empty where nothing is logged.
        bad: one record per sample of a step whose loss or gradient was not finite; else empty.
        tokens: of the completions whose tokens are logged, their place among all and their arrays.
    """

    metrics: dict[str, float]
    samples: Sequence[Sample] = ()
    records: Sequence[Mapping[str, Any]] = ()
    completions: Sequence[Mapping[str, Any]] = ()
    bad: Sequence[Mapping[str, Any]] = field(default_factory=list)
    tokens: Sequence[tuple[int, Arrays]] = ()


def step_result(
    batch: Batch,
    ranks: Ranks,
    statistics: Statistics,
    updated: Mapping[str, float],
    bad: Sequence[Mapping[str, Any]],
    log_completions: bool,
    shown: Sequence[Sample] = (),
) -> StepResult:
    """Merge what every process knows of a step. All processes call this.

    Args:
        batch: of this process, complete.
        ranks: of the run.
        statistics: of the loss, joined over the processes; what they tell of single tokens is gathered here.
        updated: metrics of the optimiser step, the same on all processes.
        bad: records of a step that was not finite.
        log_completions: whether what was sampled is logged.
        shown: samples of this process whose tokens are logged, the first ones.
    """
    counted = {**batch.metrics, **{f"dropped/{reason}": float(count) for reason, count in batch.dropped.items()}}
    counted |= {"completions/kept": float(len(batch)), "completions/sampled": float(len(batch.samples))}
    counted |= lengths_and_rewards(batch.samples)
    rows = [completion_row(sample) for sample in batch.samples] if log_completions else []
    tokens = sum(len(sample.target_ids) for sample in batch.samples)
    arrays = [(sample.id, token_arrays(sample)) for sample in shown]
    parts = ranks.gather((counted, dict(batch.timing), batch.records, rows, tokens, arrays, statistics.tokens))
    metrics = merge([part[0] for part in parts])
    phases = sorted({phase for _, timing, *_ in parts for phase in timing})
    seconds = {f"timing/{phase}": max(timing.get(phase, 0.0) for _, timing, *_ in parts) for phase in phases}
    metrics |= {**seconds, **updated, **summarise(statistics)}
    metrics["perf/tokens_per_second"] = sum(part[4] for part in parts) / sum(seconds.values())
    records = [record for part in parts for record in part[2]]
    rows = [row for part in parts for row in part[3]]
    starts = np.cumsum([0] + [len(part[3]) for part in parts])
    noted = {name: told for part in parts for name, told in part[6].items()}
    placed = [
        (int(start) + i, {**own, **noted.get(name, {})})
        for start, part in zip(starts, parts, strict=False)
        for i, (name, own) in enumerate(part[5])
    ]
    return StepResult(metrics, batch.samples, records, rows, bad, placed)


def lengths_and_rewards(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over the samples of this process, to be merged."""
    if not samples:
        return {}
    metrics: dict[str, float] = {
        "completions/mean_length": mean([len(s.target_ids) for s in samples]),
        "completions/clipped_ratio": mean([s.is_clipped for s in samples]),
    }
    rewards = [s.reward for s in samples if s.reward is not None]
    if rewards:
        metrics["reward/mean"] = mean(rewards)
    return metrics


def summarise(statistics: Statistics) -> dict[str, float]:
    """Metrics of a whole step from the statistics of the loss."""
    metrics = statistics.means("teacher_kl/") | statistics.means("student_entropy")
    metrics |= statistics.means("gradient_noise")
    gap = statistics.get("gap")
    if len(gap):
        metrics["gap/mean"] = float(gap.mean())
        metrics["gap/p95"] = float(np.quantile(np.abs(gap), 0.95))
    return metrics
