"""Weights that correct for sampling with another policy than the one that is updated.

All are functions of ``difference = log pi(y) - log mu(y)``, float [T]: log-probs of the sampled tokens under
the policy that is updated, less those under the policy that sampled. Both are of the distribution after
temperature, penalty, top-k and top-p (:class:`opdengine.types.Sample`): between a processed and an
unprocessed one the ratio would differ from 1 without any update. They multiply an advantage and carry no
gradient: with the stop-gradient weight ``w``, the gradient of ``-sum(w * A * log pi)`` is that of the
method's loss. A divergence over the whole vocabulary needs none of them.
"""

from __future__ import annotations

import numpy as np

LARGEST_EXPONENT = 50.0


def ratio(difference: np.ndarray) -> np.ndarray:
    """``pi / mu`` of every token, float64 [T]; finite also for tokens that ``mu`` all but excludes."""
    return np.exp(np.minimum(np.asarray(difference, dtype=np.float64), LARGEST_EXPONENT))


def truncated(difference: np.ndarray, cap: float = 2.0) -> np.ndarray:
    """``min(pi / mu, cap)``: truncated importance sampling (Ionides 2008), bounded variance for some bias.

    Args:
        difference: [T].
        cap: largest weight.

    Raises:
        ValueError: the cap is not positive.
    """
    if not cap > 0:
        raise ValueError(f"cap={cap} is not possible; it must be positive (1 never raises a weight)")
    weights: np.ndarray = np.minimum(ratio(difference), cap)
    return weights


def banded(difference: np.ndarray, low: float = 0.5, high: float = 2.0) -> np.ndarray:
    """``pi / mu`` where it lies in [low, high], else 0 (CaMOPD, arXiv 2605.27115, equation 2).

    Raises:
        ValueError: the band is empty.
    """
    if not 0 <= low <= high:
        raise ValueError(f"the band [{low}, {high}] is not possible; it needs 0 <= low <= high")
    weight = ratio(difference)
    return np.where((weight >= low) & (weight <= high), weight, 0.0)


def clipped(difference: np.ndarray, advantage: np.ndarray, low: float = 0.2, high: float = 0.28) -> np.ndarray:
    """The weight whose gradient is that of PPO's clipped surrogate (arXiv 1707.06347, equation 7).

    The surrogate ``min(r * A, clip(r, 1 - low, 1 + high) * A)`` has the gradient ``r * A * d log pi``
    until the ratio has moved beyond the clip in the direction of the advantage, and 0 from there on.

    Args:
        difference: [T].
        advantage: [T], of which the sign counts.
        low, high: how far the ratio may fall and rise.

    Raises:
        ValueError: a bound is negative.
    """
    if low < 0 or high < 0:
        raise ValueError(f"low={low}, high={high} is not possible; neither may be negative")
    weight = ratio(difference)
    spent = np.where(np.asarray(advantage) > 0, weight > 1 + high, weight < 1 - low)
    return np.where(spent, 0.0, weight)
