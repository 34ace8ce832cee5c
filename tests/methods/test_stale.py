"""Importance weights of a divergence: what they multiply, what is counted, and where there is nothing to multiply."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from method_helpers import make_rollout
from test_rewards import EVEN, built

from opdengine.config.train import ConfigError
from opdengine.metrics import Mean
from opdengine.types import Batch

OLDER: dict[str, Any] = {"max_staleness": 1, "use_vllm": True}
SELF = [{"model": "self", "weights": "ema"}]
PRETRAINED = [{"model": "t"}, {"model": "self", "weights": "base"}]


def test_a_divergence_counts_by_how_likely_its_token_is_now() -> None:
    """min(r, 1.5) of tokens whose ratio is known; a rollout without log-probs of the sampler counts in full."""
    method = built("opd", distillation_is_clip=1.5)
    known, unknown = make_rollout("a", [1, 2, 3]), make_rollout("b", [1, 2])
    known.policy_logratio = np.log([0.5, 1.2, 4.0]).astype(np.float32)
    batch = Batch(samples=[known, unknown])
    method.weigh(batch)
    np.testing.assert_allclose(known.kl_weight, [0.5, 1.2, 1.5], rtol=1e-6)
    np.testing.assert_allclose(unknown.kl_weight, [1, 1])
    weight = batch.metrics["stale/weight"]
    assert isinstance(weight, Mean) and weight.weight == 3 and float(weight) == pytest.approx(3.2 / 3)
    assert batch.metrics["stale/unknown"] == 1
    assert any(c.fires({"stale/unknown": 1.0, "completions/sampled": 2.0}) for c in method.checks)
    batch = Batch(samples=[known])
    method.weigh(batch)
    assert "stale/unknown" not in batch.metrics


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("grpo", {"teachers": [], "num_generations": 2, "verifier": EVEN}),
        ("mt_seqkd", {}),
        ("sage_opd", {"train_data": [], "environment": {"name": "search"}, "sage": {"kl_mode": "sampled"}}),
        ("uni_opd", {"num_generations": 4}),
        ("camopd", {"teachers": [{"model": "t", "key": ["a"]}, {"model": "u", "key": ["b"]}],
                    "camopd": {"domain": ["a"]}}),
        ("relaxed_opd", {}),
        ("g_opd", {"teachers": PRETRAINED, "g_opd": {"reference": "self"}}),
        ("sdpo", {"teachers": SELF}),
        ("sdpo", {"teachers": SELF, "sdpo": {"distillation_weight": 0}, "advantage": {"kl_mode": "full_vocab"}}),
    ],
)  # fmt: skip
def test_where_nothing_diverges_there_is_nothing_to_multiply(method: str, settings: dict[str, Any]) -> None:
    built(method, **settings)  # is possible in itself
    with pytest.raises(ConfigError, match=rf"distillation_is_clip=2.0 is not possible with method '{method}' as it is"):
        built(method, distillation_is_clip=2.0, **settings)
    with pytest.raises(ConfigError, match=rf"teacher_reduction='mixture' has no effect with method '{method}' as it"):
        built(method, teacher_reduction="mixture", **settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("opd", {}),
        ("selectkd", {}),
        ("sage_opd", {"train_data": [], "environment": {"name": "search"}}),
        ("uni_opd", {"num_generations": 4, "advantage": {"kl_mode": "full_vocab"}}),
        ("sdpo", {"teachers": SELF, "advantage": {"kl_mode": "full_vocab"}}),
    ],
)
def test_where_something_diverges_there_is(method: str, settings: dict[str, Any]) -> None:
    assert "policy_logratio" in built(method, distillation_is_clip=2.0, **settings).needs


def test_what_was_chosen_greedily_has_no_ratio() -> None:
    built("opd", distillation_is_clip=2.0, temperature=0.0)  # on policy every ratio is 1
    built("opd", temperature=0.0, **OLDER)
    with pytest.raises(ConfigError, match="temperature=0 and max_staleness=1: what is chosen greedily"):
        built("opd", distillation_is_clip=2.0, temperature=0.0, **OLDER)


@pytest.mark.parametrize(
    ("method", "settings", "asks"),
    [
        ("opd", {"distillation_is_clip": 2.0}, "distillation_is_clip=2.0"),
        ("opd", {"grpo": {"weight": 0.5}, "num_generations": 2}, "grpo.weight=0.5"),
        ("grpo", {"teachers": [], "num_generations": 2}, "grpo.weight=1.0"),
        ("sdpo", {"teachers": SELF, "sdpo": {"distillation_weight": 0.5}, "advantage": {"importance": "none"}},
         "sdpo.distillation_weight=0.5"),
    ],
)  # fmt: skip
def test_the_limit_of_every_ratio_is_said(
    caplog: pytest.LogCaptureFixture, method: str, settings: dict[str, Any], asks: str
) -> None:
    with caplog.at_level(logging.WARNING):
        built(method, top_p=0.9, **settings)
        assert "older policy" not in caplog.text
        if method == "sdpo":
            settings = {**settings, "teachers": [{"model": "self", "weights": "base"}]}
        built(method, top_p=0.9, **OLDER, **settings)
    assert f"max_staleness=1 and {asks}: importance weights" in caplog.text


def test_rewards_say_what_they_cannot_clip() -> None:
    """A rollout of older weights of which the sampler told nothing."""
    method = built("grpo", [], num_generations=2)
    known, unknown = (make_rollout(name, [1, 2], group="g", reward=reward) for name, reward in (("a", 1.0), ("b", 0.0)))
    known.policy_logratio = np.zeros(2, dtype=np.float32)
    batch = Batch(samples=[known, unknown])
    method.weigh(batch)
    assert batch.metrics["grpo/unknown"] == 1 and batch.metrics["grpo/rollouts"] == 2
    assert any(c.fires(batch.metrics) for c in method.checks if c.failed == "grpo/unknown")
    sdpo = built("sdpo", SELF, sdpo={"distillation_weight": 0.5})
    assert any(c.fires(batch.metrics) for c in sdpo.checks if c.failed == "grpo/unknown")
    unknown.policy_logratio = known.policy_logratio
    method.weigh(batch := Batch(samples=[known, unknown]))
    assert "grpo/unknown" not in batch.metrics
