"""Importance weights against autograd of the losses that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from opdengine.loss.importance import banded, clipped, ratio, truncated

RNG = np.random.default_rng(0)
DIFFERENCE = RNG.normal(0, 0.5, 400)
ADVANTAGE = RNG.normal(0, 1, 400)


def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """d loss / d log pi at the given ratio."""
    logprob = torch.tensor(DIFFERENCE, requires_grad=True)
    loss(logprob).backward()
    assert logprob.grad is not None
    return logprob.grad.numpy()


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.1, 0.1), (0.0, 0.5)])
def test_clipped_weight_has_the_gradient_of_ppos_surrogate(low: float, high: float) -> None:
    advantage = torch.tensor(ADVANTAGE)

    def surrogate(logprob: torch.Tensor) -> torch.Tensor:
        r = logprob.exp()  # the sampler's log-prob is 0 here
        return torch.maximum(-r * advantage, -r.clamp(1 - low, 1 + high) * advantage).sum()

    ours = -clipped(DIFFERENCE, ADVANTAGE, low, high) * ADVANTAGE
    np.testing.assert_allclose(ours, gradient(surrogate), rtol=1e-12)
    assert (ours == 0).any() and (ours != 0).any()


def test_ratio_is_the_exact_correction() -> None:
    """Under mu, r * f has the mean of f under pi: all tokens of a small vocabulary, enumerated."""
    pi, mu = RNG.dirichlet(np.ones(7)), RNG.dirichlet(np.ones(7))
    f = RNG.normal(size=7)
    assert (mu * ratio(np.log(pi) - np.log(mu)) * f).sum() == pytest.approx((pi * f).sum())


def test_truncation_and_band() -> None:
    r = np.array([0.1, 0.5, 1.0, 2.0, 5.0])
    np.testing.assert_allclose(truncated(np.log(r)), [0.1, 0.5, 1, 2, 2])
    np.testing.assert_allclose(truncated(np.log(r), cap=1.0), [0.1, 0.5, 1, 1, 1])
    np.testing.assert_allclose(banded(np.log(r), 0.4, 2.1), [0, 0.5, 1, 2, 0])
    np.testing.assert_allclose(banded(np.zeros(3)), 1)
    np.testing.assert_allclose(clipped(np.log(r), np.ones(5)), [0.1, 0.5, 1, 0, 0])
    np.testing.assert_allclose(clipped(np.log(r), -np.ones(5)), [0, 0, 1, 2, 5])


def test_weights_are_finite_for_tokens_that_the_sampler_excludes() -> None:
    assert np.isfinite(ratio(np.array([1e4, -1e4]))).all()
    assert truncated(np.array([1e4, -1e4])).tolist() == [2, 0]
    assert banded(np.array([1e4])).tolist() == [0]


@pytest.mark.parametrize(
    "call",
    [
        lambda d: truncated(d, 0),
        lambda d: banded(d, 2, 1),
        lambda d: banded(d, -1, 1),
        lambda d: clipped(d, d, -0.1),
    ],
)
def test_impossible_bounds_are_refused(call: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(ValueError, match="is not possible"):
        call(np.zeros(2))
