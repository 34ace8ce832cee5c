"""From a problem to its outcome: which pass runs on which rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .driver import Outcome, Pass, Scales, SomeRows
from .heads import HeadGradient, ShardGradient, Wants
from .problem import Problem
from .sampled import SampledPass
from .selection import RowPlan, plan_rows
from .splitmix import uniforms
from .types import TokenStats

LEAST_VALUES = 32
"""Rows whose divergence is computed where columns are sampled and the teachers' normalisers are not needed."""
VALUES = 0.5
"""As above: this times the share of the columns, of the rows."""
NO_BLOCK = -1


def run_divergence(
    problem: Problem, rows: RowPlan, scales: Scales | None, wants: Wants, values: bool = True
) -> Outcome:
    """Solve ``problem`` for the rows of ``rows``.

    Args:
        problem: the validated call.
        rows: what is computed.
        scales: read only when a gradient is wanted.
        wants: the gradients to compute. With shards those of weight and bias are of this rank's shard, that of
            the hidden states is summed over the ranks.
        values: whether losses and statistics are needed beside gradients.

    ``Outcome.check`` is left to the caller, when everything else has been given to the device.
    """
    like = problem.student.hidden.new_empty(0, dtype=problem.compute_dtype)
    nothing = like.new_full((problem.rows,), float("nan"))
    outcome = Outcome(nothing, None, None if problem.logprob_weight is None else nothing.clone())
    if problem.stats:
        outcome.stats = TokenStats.empty(problem.rows, len(problem.teachers), problem.labels is not None, like)
    shards = problem.shards
    gradient: HeadGradient = (
        HeadGradient(problem.student, wants, rows, problem.compute_dtype)
        if shards is None
        else ShardGradient(problem.student, wants, rows, problem.compute_dtype, shards)
    )
    work: Pass | None = None
    if rows.count and wants and problem.teachers_sampled:
        work = sampled = SampledPass(problem, rows, scales, wants, outcome, gradient, like)
        sampled.run()
        if values:
            outcome.some = values_of_some(problem, scales, outcome, like, sampled.finite())
    elif rows.count:
        work = Pass(problem, rows, scales, wants, outcome, gradient, like)
        work.run()
    if outcome.stats is not None:
        outcome.stats.fill_gap()
    outcome.hidden, outcome.weight, outcome.bias = gradient.finish()
    if work is not None and work.sampler is not None:
        outcome.sampling = work.sampler.report(outcome.hidden, outcome.weight, gradient.unscale)
    return outcome


def values_of_some(
    problem: Problem, scales: Scales | None, outcome: Outcome, like: Tensor, exact: Tensor
) -> SomeRows | None:
    """Losses and statistics of a sample of the rows that have a teacher, into ``outcome``; None where no row has."""
    assert scales is not None and problem.sampling is not None
    index = torch.nonzero((scales.divergence != 0) & (problem.mix > 0).any(1))[:, 0]
    total = index.numel()
    count = min(total, max(LEAST_VALUES, round(VALUES * problem.sampling.share * total)))
    if count == 0:
        return None
    order = uniforms(index, problem.sampling.seed, NO_BLOCK).argsort()
    chosen = torch.zeros_like(scales.divergence, dtype=torch.bool)
    chosen[index[order[:count]]] = True
    some = plan_rows(problem.mix, problem.mix_is_uniform, chosen, known=problem.known_teachers)
    plain = replace(problem, sampling=None, logprob_weight=None)
    gradient = HeadGradient(problem.student, Wants(), some, problem.compute_dtype)
    Pass(plain, some, None, Wants(), outcome, gradient, like).run()
    return SomeRows(chosen, count, total, exact)
