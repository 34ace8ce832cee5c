"""Generate and grade: no teacher needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opdengine.rollout import Sampler
from opdengine.types import Prompt, Request, SamplingParams
from opdengine.verifiers import Verifier


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation.

    Args:
        scores: float64 [N], one per prompt.
        keys: the prompts' routing keys.
        texts: what was written.
        mean_length: in tokens.
        clipped_ratio: share that ran into the length limit.
    """

    scores: np.ndarray
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    mean_length: float
    clipped_ratio: float

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    def by_key(self) -> dict[str, float]:
        """Mean score per routing key."""
        keys = np.array(self.keys)
        return {key: float(self.scores[keys == key].mean()) for key in sorted(set(self.keys))}

    def metrics(self) -> dict[str, float]:
        """As ``eval/...`` metrics."""
        values = {
            "eval/accuracy": self.accuracy,
            "eval/mean_length": self.mean_length,
            "eval/clipped_ratio": self.clipped_ratio,
        }
        keyed = self.by_key()
        if len(keyed) > 1:
            values.update({f"eval/accuracy/{key}": score for key, score in keyed.items()})
        return values


def require_answers(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts, all of which have an answer.

    Raises:
        ValueError: some have none; names the first.
    """
    without = [p.id for p in prompts if p.answer is None]
    if without:
        raise ValueError(
            f"{len(without)} evaluation prompts have no 'answer' (e.g. {without[:3]}); evaluation compares with it"
        )
    return prompts


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    encode: Callable[[Prompt], list[int]],
    verifier: Verifier,
    max_tokens: int,
) -> Evaluation:
    """Greedy decoding, one answer per prompt, graded by the verifier.

    Args:
        sampler: the policy.
        prompts: with answers.
        encode: prompt -> token ids.
        verifier: grades text against answer.
        max_tokens: most new tokens.
    """
    requests = [Request(p.id, tuple(encode(p))) for p in prompts]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    answers = [completions[0] for completions in sampler.generate(requests, params)]
    scores = [verifier(a.text, p.answer, p.messages) for a, p in zip(answers, prompts, strict=True)]
    return Evaluation(
        scores=np.array(scores, dtype=np.float64),
        keys=tuple(p.key for p in prompts),
        texts=tuple(a.text for a in answers),
        mean_length=float(np.mean([len(a.token_ids) for a in answers])),
        clipped_ratio=float(np.mean([a.stop_reason == "length" for a in answers])),
    )
