"""Rules and constants of the papers that no other test would miss: each number here is the paper's, not the code's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from method_helpers import make_batch, make_rollout

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.loss.importance import banded, clipped
from opdengine.methods import build_method
from opdengine.methods.policy_gradient import PolicyGradient
from opdengine.methods.sage_opd import confidence
from opdengine.methods.uni_opd import narrowing
from opdengine.tools.balance import BalanceSettings
from opdengine.types import Batch


def method(name: str, **settings: Any) -> Any:
    """A method with some settings and no model; two teachers, one of them of the domain "d"."""
    teachers = [{"model": "t", "key": ["g"]}, {"model": "u", "key": ["d"]}]
    data = {"model": "m", "teachers": teachers, "output_dir": "o", "train_data": ["x"], "method": name}
    return build_method(from_mapping(TrainConfig, {**data, **settings}))


def test_entropy_aware_opd_doubles_the_weight_of_uncertain_tokens() -> None:
    """arXiv 2606.19659, equation 26: 1 + alpha above tau, with alpha 1 and tau 0.8."""
    sample = make_rollout("a", [1, 2, 3, 4])
    sample.teacher_entropy = np.array([0.1, 0.79, 0.81, 3.0], dtype=np.float32)[:, None]
    method("entropy_opd").weigh(Batch(samples=[sample]))
    assert sample.kl_weight is not None and sample.kl_weight.tolist() == [1, 1, 2, 2]


def test_the_mask_of_gaps_looks_at_the_gap_and_not_at_what_is_shifted() -> None:
    """A gap of 9.9 stays though the shift makes 10.3 of it; one of -10.1 goes though the shift makes -9.7 of it."""
    sample = make_rollout("a", [1, 2, 3])
    batch = make_batch([sample], [[9.9, -10.1, 1.0]])
    PolicyGradient(max_gap=10.0).weigh(batch, Ranks(), shift=[0.4])
    np.testing.assert_allclose(sample.advantage, [10.3, 0.0, 1.4], rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(1.27, 1, 1.27), (1.29, 1, 0), (1.29, -1, 1.29), (0.81, -1, 0.81), (0.79, -1, 0), (0.79, 1, 0.79)],
)
def test_ppo_clips_at_0_8_and_1_28(ratio: float, advantage: float, weight: float) -> None:
    found = clipped(np.log([ratio]), np.array([advantage]))
    np.testing.assert_allclose(found, [weight], rtol=1e-6)


@pytest.mark.parametrize(("ratio", "weight"), [(0.49, 0), (0.51, 0.51), (1.99, 1.99), (2.01, 0)])
def test_the_band_is_half_to_twice(ratio: float, weight: float) -> None:
    np.testing.assert_allclose(banded(np.log([ratio])), [weight], rtol=1e-6)


def test_only_whole_rewards_are_correct_rollouts() -> None:
    """Half a reward is none: of three rollouts one is correct."""
    rollouts = [make_rollout(str(i), [i + 1], group="g", reward=reward) for i, reward in enumerate((1.0, 0.5, 0.99))]
    batch = Batch(samples=rollouts)
    method("uni_opd", num_generations=3).select(batch)
    assert float(batch.metrics["balance/correct_before"]) == pytest.approx(1 / 3)


def test_offline_balancing_asks_each_prompt_eight_times() -> None:
    assert {f.name: f.default for f in dataclasses.fields(BalanceSettings)}["rollouts"] == 8


def test_the_greedy_mask_takes_the_correct_one_in_a_tie() -> None:
    """Both removals widen the margin alike: from 0 - 0 to 1."""
    returns, correct = np.array([0.0, 2.0, 0.0, 2.0]), np.array([True, True, False, False])
    assert narrowing(returns, correct, 1.0, "mean").tolist() == [True, False, False, False]


def test_each_branch_of_camopd_has_its_own_share() -> None:
    """Three rollouts that hold half, 0.3 and 0.2 of the mass: 0.8 of it are two, 0.9 of it are three."""
    gaps = [[0.5], [0.3], [0.2]]
    for key, kept in (("g", 2), ("d", 3)):
        rollouts = [make_rollout(f"{key}{i}", [1], key=key) for i in range(3)]
        camopd = method("camopd", camopd={"domain": ["d"], "rho_g": 0.79, "rho_d": 0.9})
        camopd.gradient = PolicyGradient()
        batch = make_batch(rollouts, gaps)
        camopd.weigh(batch)
        assert len(batch) == kept


def test_the_confidence_of_a_turn_is_weighted_as_its_teachers_are() -> None:
    sample = make_rollout("a", [1, 2])
    sample.mix = np.array([0.75, 0.25], dtype=np.float32)
    sample.teacher_top1 = np.array([[1.0, 0.2], [0.6, 0.2]], dtype=np.float32)
    np.testing.assert_allclose(confidence(sample), 0.75 * 0.8 + 0.25 * 0.2, rtol=1e-6)
