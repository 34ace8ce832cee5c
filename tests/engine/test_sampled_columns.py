"""``vocab_sample`` in a step: unbiased through the whole model, the same again, told in the metrics, and refused where
it does nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import loss_and_gradient, make_config, make_engine, make_samples

from opdengine.data.prompts import load_prompts
from opdengine.errors import ConfigError
from opdengine.types import Batch, Prompt

SEEDS = 60


@pytest.fixture
def prompts(prompt_file: str) -> Sequence[Prompt]:
    return load_prompts([prompt_file]).prompts


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)]).double()


@pytest.mark.parametrize("settings", [{}, {"divergence": "jsd"}, {"lora": {"r": 4, "lora_alpha": 12.0}}])
def test_the_mean_over_draws_is_the_dense_gradient(
    models: dict[str, str], prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = make_config(models, prompt_file, tmp_path, **settings)
    engine = make_engine(config)
    samples = make_samples(engine, prompts[:3])
    exact = flat(loss_and_gradient(engine, samples)[1])
    draws = []
    for seed in range(SEEDS):
        engine.config = dataclasses.replace(config, vocab_sample=0.3, seed=seed)
        draws.append(flat(loss_and_gradient(engine, samples)[1]))
    every = torch.stack(draws)
    noise = every.var(0).sum()
    assert noise > 1e-6 * exact.square().sum()
    assert (every.mean(0) - exact).norm() < 2.0 * (noise / SEEDS).sqrt()
    engine.config = dataclasses.replace(config, vocab_sample=0.3, seed=0)
    assert torch.equal(flat(loss_and_gradient(engine, samples)[1]), draws[0])
    engine.version += 1
    assert not torch.equal(flat(loss_and_gradient(engine, samples)[1]), draws[0])


def test_the_noise_is_a_metric(
    models: dict[str, str], prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    found = {}
    for share in (0.0, 0.3):
        engine = make_engine(make_config(models, prompt_file, tmp_path, vocab_sample=share))
        found[share] = engine.update(Batch(samples=make_samples(engine, prompts[:3]))).metrics
    assert "gradient_noise" not in found[0.0] and 0 < found[0.3]["gradient_noise"] < 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_impl": "reference"}, "computes every column"),
        ({"method": "mt_seqkd"}, "and none does: use 0"),
    ],
)
def test_it_is_refused_where_it_does_nothing(
    models: dict[str, str], prompt_file: str, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(models, prompt_file, tmp_path, vocab_sample=0.1, **settings)
