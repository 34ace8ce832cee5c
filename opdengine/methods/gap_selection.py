"""Scores of rollouts by their gaps, and which of them to train on (CaMOPD, arXiv 2605.27115)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TOLERANCE = 1e-6
"""Of a share and of a count: what only rounding has moved beyond a bound has reached it."""


def gap_score(gap: np.ndarray, kind: str) -> float:
    """Mean over tokens of |gap|, max(gap, 0), gap or gap squared (equations 6 and 7)."""
    values = {"abs": np.abs(gap), "pos": np.maximum(gap, 0), "signed": gap, "sq": gap * gap}[kind]
    return float(values.mean())


def mass_prefix(scores: np.ndarray, rho: float) -> np.ndarray:
    """bool [N]: the fewest largest scores whose sum reaches ``rho`` of the total (equation 8).

    Ties go to the earlier one. Negative scores count as 0; where no score is positive all are kept.
    """
    positive = np.maximum(np.asarray(scores, dtype=np.float64), 0.0)
    if positive.sum() <= 1e-12:
        return np.ones(len(positive), dtype=bool)
    order = np.argsort(-positive, kind="stable")
    share = np.cumsum(positive[order]) / positive.sum()
    count = int(np.argmax(share >= rho - TOLERANCE)) + 1
    chosen = np.zeros(len(positive), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def select(scores: np.ndarray, rho: float, how: str, seed: Sequence[int]) -> np.ndarray:
    """bool [N]: see ``selection`` in :class:`opdengine.config.method_sections.CaMOPDConfig`."""
    chosen = np.ones(len(scores), dtype=bool)
    if how == "none" or not len(scores):
        return chosen
    if how == "topk_frac":
        chosen[np.argsort(-scores, kind="stable")[int(np.ceil(rho * len(scores) - TOLERANCE)) :]] = False
        return chosen
    chosen = mass_prefix(scores, rho)
    return np.random.default_rng(seed).permutation(chosen) if how == "random" else chosen


def branch_metrics(branch: str, gap: Sequence[np.ndarray], scores: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Gap statistics (the signed mean is about -KL), the selected share, and whether long rollouts score less."""
    every, lengths = np.concatenate(gap), np.array([len(g) for g in gap], dtype=np.float64)
    values = {
        "gap_abs": np.abs(every).mean(),
        "gap_positive": np.maximum(every, 0).mean(),
        "gap_signed": every.mean(),
        "selected": chosen.sum(),
        "selected_share": chosen.mean(),
    }
    if scores.std() > 0 and lengths.std() > 0:
        values["score_length_correlation"] = np.corrcoef(scores, lengths)[0, 1]
    return {f"camopd/{branch}/{name}": float(value) for name, value in values.items()}
