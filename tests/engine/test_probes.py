"""The probes stop a run that would train on something wrong, and leave a healthy one alone."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_config, make_engine

from opdengine.data.prompts import load_prompts
from opdengine.errors import ProbeError
from opdengine.training.sanity import fresh, sampler_agrees, self_distillation_is_zero
from opdengine.training.step import Engine
from opdengine.types import Prompt


@pytest.fixture
def prompts(prompt_file: str) -> Sequence[Prompt]:
    return load_prompts([prompt_file]).prompts[:4]


@pytest.fixture
def engine(models: dict[str, str], prompt_file: str, tmp_path: Path) -> Engine:
    return make_engine(make_config(models, prompt_file, tmp_path, learning_rate=0.0))


def test_a_healthy_run_passes(engine: Engine, prompts: Sequence[Prompt]) -> None:
    for _ in range(2):
        metrics = asyncio.run(engine.step(prompts)).metrics
    assert metrics["sampling/logprob_difference_max"] < 1e-3
    assert metrics["sampling/importance_ratio_max"] == pytest.approx(1, abs=1e-3)
    assert engine.probed


def test_a_dead_teacher_stops_the_run(engine: Engine, prompts: Sequence[Prompt]) -> None:
    with torch.no_grad():
        engine.teachers[1].backbone.model.get_output_embeddings().weight.mul_(1e-4)
    with pytest.raises(ProbeError, match=rf"teacher 'small' is dead: its mean entropy 5\.7.*{math.log(303):.3f}"):
        asyncio.run(engine.step(prompts))


def test_a_sampler_with_other_weights_stops_the_run(engine: Engine, prompts: Sequence[Prompt]) -> None:
    plain = engine.sampler.generate

    def generate(requests, params):
        weight = engine.student.model.model.norm.weight
        with torch.no_grad():
            weight.mul_(0.2)
        try:
            return plain(requests, params)
        finally:
            with torch.no_grad():
                weight.div_(0.2)

    engine.sampler.generate = generate
    with pytest.raises(ProbeError, match=r"sampler and trainer disagree .* allowed max_logprob_difference=0.5"):
        asyncio.run(engine.step(prompts))
    engine.config = dataclasses.replace(engine.config, max_logprob_difference=50.0)
    metrics = asyncio.run(engine.step(prompts)).metrics
    assert metrics["sampling/logprob_difference"] > 0.5


def test_a_sampler_that_was_not_synchronised_stops_the_run(engine: Engine, prompts: Sequence[Prompt]) -> None:
    asyncio.run(engine.step(prompts))
    engine.sampler.policy_version = 0
    with pytest.raises(ProbeError, match=r"rollouts of policy versions \[0\] reached the update of version 1"):
        asyncio.run(engine.step(prompts))


def test_staleness_is_measured_and_bounded() -> None:
    versions = [3, 5, 4]
    assert fresh(versions[:1], 3, 0) == {"sampling/staleness_max": 0.0}
    assert fresh(versions, 5, 2) == {"sampling/staleness_max": 2.0}
    with pytest.raises(ProbeError, match=r"versions \[3\] reached the update of version 5 \(max_staleness=1\)"):
        fresh(versions, 5, 1)
    with pytest.raises(ProbeError, match=r"versions \[5\]"):
        fresh(versions, 4, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 5},
        {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 0.0},
        {"divergence_temperature": 2.0},
    ],
)
def test_modified_sampling_is_compared_under_the_same_processing(
    models: dict[str, str], prompt_file: str, tmp_path: Path, prompts: Sequence[Prompt], changes: dict[str, Any]
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, **changes))
    metrics = asyncio.run(engine.step(prompts)).metrics
    assert metrics["sampling/logprob_difference_max"] < 1e-4
    assert metrics["sampling/importance_ratio_max"] == pytest.approx(1, abs=1e-3)
    assert "sampling/outside_support" not in metrics
    before = engine.student.model.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():  # the sampler shares the trainer's weights: move them between rollout and update
        prepared = asyncio.run(engine.prepare(prompts))
        for parameter in engine.student.model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ProbeError, match="sampler and trainer disagree"):
        asyncio.run(engine.finish(prepared))
    torch.testing.assert_close(engine.student.model.model.embed_tokens.weight, before * 1.5)


def test_tokens_outside_the_trainers_support_are_counted() -> None:
    few = np.array([0.01] * 9 + [-np.inf])
    assert sampler_agrees(few, 0.5)["sampling/outside_support"] == pytest.approx(0.1)
    with pytest.raises(ProbeError, match="33% of the tokens are outside"):
        sampler_agrees(np.array([0.0, 0.0, -np.inf]), 0.5)
    with pytest.raises(ProbeError, match="100%"):
        sampler_agrees(np.array([-np.inf]), 0.5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_loss_that_does_not_fit_the_model_is_found(engine: Engine, divergence: str) -> None:
    hidden = torch.randn(8, 32)
    head = engine.student.head
    self_distillation_is_zero(hidden, head, divergence, 303, "auto")
    broken = dataclasses.replace(head, weight=head.weight.detach() * float("nan"))
    with pytest.raises((ProbeError, ValueError), match=r"instead of 0|NaN"):
        self_distillation_is_zero(hidden, broken, divergence, 303, "auto")


def test_a_loss_that_is_not_finite_moves_nothing_and_is_written_down(engine: Engine, prompts: Sequence[Prompt]) -> None:
    before = engine.student.model.model.embed_tokens.weight.clone()
    engine.probed = True
    plain = engine.objective

    class Broken:
        def __call__(self, *args, **kwargs):
            return plain()(*args, **kwargs) * float("inf")

    engine.objective = lambda: Broken()
    result = asyncio.run(engine.step(prompts))
    assert result.metrics["bad_steps"] == 1 and "loss" not in result.metrics
    assert [row["id"] for row in result.bad] == [r.id for r in result.samples]
    assert {row["loss_of_micro_batch"] for row in result.bad} == {float("inf")}
    assert all(len(row["kl_weight"]) == len(r.target_ids) for row, r in zip(result.bad, result.samples, strict=True))
    assert all(p.grad is None for p in engine.student.model.parameters())
    assert torch.equal(engine.student.model.model.embed_tokens.weight, before)
    assert engine.version == 0
