"""The trainer's log-probs under the sampler's own processing, for a few samples of a step.

The statistics of the loss are log-probs of the model itself. When the student is sampled at another
temperature or with top-k, top-p or a penalty, the sampler's log-probs are of that other distribution, and
only the trainer's full logits, processed alike, can be compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opd_kernels import LMHead
from opdengine.models.backbone import Backbone
from opdengine.rollout.transformers import penalise, truncate
from opdengine.types import Sample, SamplingParams

ROLLOUTS, TOKENS = 2, 128
"""At most this many tokens of a step are compared, since all their logits are held at the same time."""


def processed_differences(
    student: Backbone, samples: Sequence[Sample], params: SamplingParams, vocab_size: int
) -> np.ndarray:
    """float32 [T]: trainer minus sampler log-prob of the first tokens of the shortest samples.

    Args:
        student: in evaluation mode.
        samples: of the step; those without the sampler's log-probs are passed over.
        params: how they were sampled.
        vocab_size: valid leading columns of the head.

    Returns:
        -inf where the trainer's distribution excludes what was sampled.
    """
    known = [(s, s.sampler_logprob) for s in samples if s.sampler_logprob is not None and len(s.target_ids)]
    chosen = sorted(known, key=lambda pair: len(pair[0].token_ids))[:ROLLOUTS]
    ids, positions = zip(*(_start(s) for s, _ in chosen), strict=True) if chosen else ((), ())
    states, head = student.score(ids, positions, [s.images for s, _ in chosen]), student.head
    differences = [
        _processed(head, tokens, places, hidden, params, vocab_size) - logprobs[:TOKENS]
        for (_, logprobs), tokens, places, hidden in zip(chosen, ids, positions, states, strict=True)
    ]
    return np.concatenate(differences) if differences else np.zeros(0, dtype=np.float32)


def _start(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Token ids up to the last target that is compared, and the positions of those targets."""
    positions = sample.target_positions[:TOKENS]
    return sample.token_ids[: positions[-1] + 1], positions


@torch.no_grad()
def processed_rows(
    head: LMHead,
    ids: np.ndarray,
    positions: np.ndarray,
    hidden: torch.Tensor,
    params: SamplingParams,
    vocab_size: int,
) -> np.ndarray:
    """float32 [T]: log-probs of ``ids[positions]`` after penalty, temperature, top-k and top-p, some rows at a time.

    Args:
        head: of the student.
        ids: int64 [L] of one sequence.
        positions: int64 [T] of its targets.
        hidden: [T, d] states that predict them.
        params: how they were sampled.
        vocab_size: valid leading columns of the head.

    Returns:
        -inf where top-k or top-p exclude the token.
    """
    cuts = range(0, len(positions), TOKENS)
    parts = [_processed(head, ids, positions[i : i + TOKENS], hidden[i : i + TOKENS], params, vocab_size) for i in cuts]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


@torch.no_grad()
def _processed(
    head: LMHead,
    ids: np.ndarray,
    positions: np.ndarray,
    hidden: torch.Tensor,
    params: SamplingParams,
    vocab_size: int,
) -> np.ndarray:
    logits = head.logits(hidden.to(head.weight.device, head.weight.dtype))[:, :vocab_size].float()
    sequence = torch.from_numpy(ids).to(logits.device)
    if params.repetition_penalty != 1.0:
        seen = torch.zeros(len(positions), vocab_size + 1, dtype=torch.bool, device=logits.device)
        for row, position in enumerate(positions.tolist()):
            seen[row, sequence[:position].clamp(max=vocab_size)] = True
        logits = penalise(logits, seen, params.repetition_penalty)
    if params.temperature:
        logits = truncate(logits / params.temperature, params)
    targets = sequence[torch.from_numpy(positions).to(sequence.device)]
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu().numpy()
