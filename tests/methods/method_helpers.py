"""Steps made by hand: rollouts, notes and statistics without any model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opdengine.recipe import Batch, Note, Stats
from opdengine.types import Prompt, Rollout, Turn


def make_rollout(
    id: str,
    targets: Sequence[int] = (1,),
    *,
    key: str = "",
    group: str = "",
    reward: float | None = None,
    logprobs: Sequence[float] | None = None,
    trajectory: str = "",
) -> Rollout:
    """One prompt token, then the targets."""
    prompt = Prompt(group or id, ({"role": "user", "content": id},), key=key)
    answer = Turn("assistant", np.array(targets), None if logprobs is None else np.array(logprobs), trains=True)
    turns = (Turn("prompt", np.array([0])), answer)
    return Rollout(id, prompt, turns, reward=reward, group=group or id, trajectory=trajectory)


def make_batch(
    rollouts: Sequence[Rollout],
    gaps: Sequence[Sequence[float]],
    student: Sequence[Sequence[float]] | None = None,
    step: int = 0,
) -> Batch:
    """One teacher whose log-probs lie above the student's by the given gaps; sampled at temperature 1."""
    own = [np.zeros(len(g)) - 1 for g in gaps] if student is None else [np.array(s) for s in student]
    ratios = [None if r.logprobs is None else s - r.logprobs for r, s in zip(rollouts, own, strict=True)]
    stats = [
        Stats(
            student_logprob=s.astype(np.float32),
            teacher_logprob=(s + np.array(g))[:, None].astype(np.float32),
            policy_logratio=ratio,
            sampler_logratio=ratio,
        )
        for s, g, ratio in zip(own, gaps, ratios, strict=True)
    ]
    return Batch(rollouts, [Note() for _ in rollouts], stats, step)
