"""Importance ratios: 1 on policy however the student is sampled, and between updates that of two processed policies."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import full_logprobs, make_config, make_engine

from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.methods import build_method
from opdengine.training.step import Engine
from opdengine.types import Batch, Sample

Models = dict[str, str]

SAMPLING: list[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.3},
]
METHODS = ["uni_opd", "camopd"]


def config_of(models: Models, prompt_file: str, folder: Path, method: str, **changes: Any) -> TrainConfig:
    """Either method on two samples of a prompt, everything selected and nothing masked by its gap."""
    special: dict[str, Any] = {"uni_opd": {"balance": "none"}}
    if method == "camopd":
        special = {
            "camopd": {"domain": ["code"], "selection": "none"},
            "teachers": [{"model": models["big"], "key": ["agentic"]}, {"model": models["small"], "key": ["code"]}],
        }
    advantage = {"max_gap": float("inf"), **changes.pop("advantage", {})}
    return make_config(
        models, prompt_file, folder, method=method, advantage=advantage, num_generations=2,
        max_completion_length=30, **special, **changes,
    )  # fmt: skip


def one_step(engine: Engine, prompt_file: str, moved: float = 0.0) -> Batch:
    """A measured and weighed batch; the student's parameters may move after sampling."""

    async def run() -> Batch:
        batch = await engine.rollout(load_prompts([prompt_file]).prompts[:4], 0)
        for i, sample in enumerate(batch):
            sample.reward = float(i % 2)
        await engine.annotate(batch)
        await engine.score(batch)
        if moved:
            with torch.no_grad():
                engine.student.model.model.norm.weight.mul_(1 + moved)
            engine.version += 1
        engine.measure(batch)
        engine.weigh(batch)
        return batch

    return asyncio.run(run())


def processed(logprobs: torch.Tensor, rollout: Sample, params: dict[str, float]) -> np.ndarray:
    """float64 [T] of the targets, written down token by token from log-probs [T, V] at temperature 1."""
    found = []
    for row, position in zip(logprobs, rollout.target_positions.tolist(), strict=True):
        raw = row / params["temperature"]
        if "top_k" in params:
            raw[raw < raw.topk(int(params["top_k"])).values[-1]] = -torch.inf
        p = raw.softmax(-1)
        if "top_p" in params:
            order, mass = p.argsort(descending=True), 0.0
            for token in order.tolist():
                if mass >= params["top_p"]:
                    p[token] = 0.0
                else:
                    mass += p[token].item()
            p = p / p.sum()
        found.append(p[int(rollout.token_ids[position])].log().item())
    return np.array(found)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("method", METHODS)
def test_the_ratio_is_one_on_policy(
    models: Models, prompt_file: str, tmp_path: Path, method: str, sampling: dict[str, float]
) -> None:
    engine = make_engine(config_of(models, prompt_file, tmp_path, method, **sampling))
    batch = one_step(engine, prompt_file)
    assert batch.metrics["advantage/importance_masked"] == 0
    for sample in batch.samples:
        if method == "uni_opd":
            assert not sample.policy_logratio.any()  # to the last bit
        else:
            np.testing.assert_allclose(sample.sampler_logratio, 0, atol=1e-4)
        if sampling != SAMPLING[0]:  # where log-probs of two distributions would be compared
            assert np.abs(sample.student_logprob - sample.sampler_logprob).max() > 0.05


@pytest.mark.parametrize("sampling", [SAMPLING[0], SAMPLING[1], {"temperature": 1.3, "top_p": 0.8, "top_k": 40}])
@pytest.mark.parametrize("method", METHODS)
def test_after_an_update_it_is_that_of_the_two_processed_policies(
    models: Models, prompt_file: str, tmp_path: Path, method: str, sampling: dict[str, float]
) -> None:
    engine = make_engine(config_of(models, prompt_file, tmp_path / "run", method, **sampling))
    batch = one_step(engine, prompt_file, moved=0.1)
    engine.student.model.save_pretrained(tmp_path / "moved")
    excluded = 0
    for rollout in batch.samples:
        before, after = (
            processed(
                full_logprobs(m, rollout.token_ids, rollout.target_positions, engine.vocab_size), rollout, sampling
            )
            for m in (models["student"], str(tmp_path / "moved"))
        )
        ours = rollout.policy_logratio if method == "uni_opd" else rollout.sampler_logratio
        np.testing.assert_allclose(ours, after - before, atol=2e-3)
        assert np.abs(after - before).max() > 0.01
        excluded += int(np.isneginf(ours).sum())
    assert (excluded > 0) == ("top_p" in sampling)


def test_rollouts_of_two_versions_in_one_step(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """Only what an older policy sampled has another ratio than 1; without log-probs of the sampler it is unknown."""
    engine = make_engine(config_of(models, prompt_file, tmp_path, "uni_opd", temperature=0.6))

    async def run() -> Batch:
        batch = await engine.rollout(load_prompts([prompt_file]).prompts[:2], 0)
        batch.samples = [replace(s, reward=0.0, policy_version=i % 2) for i, s in enumerate(batch)]
        prompt, answer = batch.samples[2].turns
        batch.samples[2] = replace(batch.samples[2], turns=(prompt, replace(answer, logprobs=None)))
        await engine.annotate(batch)
        await engine.score(batch)
        with torch.no_grad():
            engine.student.model.model.norm.weight.mul_(1.2)
        engine.version = 1
        engine.measure(batch)
        engine.weigh(batch)
        return batch

    batch = asyncio.run(run())
    ratios = [sample.policy_logratio for sample in batch.samples]
    assert ratios[0].any() and ratios[2] is None
    assert not ratios[1].any() and not ratios[3].any()
    assert batch.metrics["advantage/without_sampler_logprobs"] == 1


@pytest.mark.parametrize("importance", ["clip", "band", "truncated"])
def test_greedy_rollouts_of_an_older_policy_have_no_ratio(
    models: Models, prompt_file: str, tmp_path: Path, importance: str
) -> None:
    stale = {"max_staleness": 1, "use_vllm": True, "temperature": 0.0, "advantage": {"importance": importance}}
    with pytest.raises(ConfigError, match=r"advantage.importance='\w+' is not possible with temperature=0"):
        build_method(make_config(models, prompt_file, tmp_path, method="uni_opd", **stale))


def test_what_no_ratio_corrects_is_said(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for changes in ({"max_staleness": 1, "use_vllm": True}, {"top_p": 0.9}):
        build_method(config_of(models, prompt_file, tmp_path, "uni_opd", **changes))
    assert "older policy" not in caplog.text
    with caplog.at_level(logging.WARNING):
        build_method(config_of(models, prompt_file, tmp_path, "uni_opd", max_staleness=1, use_vllm=True, top_p=0.9))
    assert "cannot correct for tokens that an older policy excluded" in caplog.text
