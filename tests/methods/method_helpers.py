"""Steps made by hand: samples with contexts and measures, without any model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opdengine.types import Batch, Prompt, Sample, Turn


def make_rollout(
    id: str,
    targets: Sequence[int] = (1,),
    *,
    key: str = "",
    group: str = "",
    reward: float | None = None,
    logprobs: Sequence[float] | None = None,
    trajectory: str = "",
) -> Sample:
    """One prompt token, then the targets."""
    prompt = Prompt(group or id, ({"role": "user", "content": id},), key=key)
    answer = Turn("assistant", np.array(targets), None if logprobs is None else np.array(logprobs), trains=True)
    turns = (Turn("prompt", np.array([0])), answer)
    return Sample(id, prompt, turns, reward=reward, group=group or id, trajectory=trajectory)


def make_batch(
    rollouts: Sequence[Sample],
    gaps: Sequence[Sequence[float]],
    student: Sequence[Sequence[float]] | None = None,
    step: int = 0,
) -> Batch:
    """One teacher whose log-probs lie above the student's by the given gaps; sampled at temperature 1."""
    own = [np.zeros(len(g)) - 1 for g in gaps] if student is None else [np.array(s) for s in student]
    for sample, s, g in zip(rollouts, own, gaps, strict=True):
        sample.student_logprob = s.astype(np.float32)
        sample.teacher_logprob = (s + np.array(g))[:, None].astype(np.float32)
        if sample.sampler_logprob is not None:
            sample.policy_logratio = sample.sampler_logratio = s - sample.sampler_logprob
    return Batch(step, list(rollouts))
