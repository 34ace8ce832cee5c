"""A prefix that several contexts share is read once, with the same result."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from opdengine.config.train import TeacherConfig
from opdengine.models.backbone import Backbone
from opdengine.teachers import prefix
from opdengine.teachers.local import LocalTeacher
from opdengine.teachers.prefix import PrefixScorer
from opdengine.types import TeacherContext

COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "qwen3": lambda: hf.Qwen3Config(**COMMON),
    "gemma2": lambda: hf.Gemma2Config(**COMMON, sliding_window=16),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=16),
    "mixtral": lambda: hf.MixtralConfig(**COMMON, num_local_experts=4),
    "mamba": lambda: hf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8),
}


def make_backbone(family: str) -> Backbone:
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return Backbone(model, family, max_tokens=64)


def contexts(groups: int = 2, samples: int = 3, length: int = 40) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Samples of a few prompts, interleaved, of unequal lengths; and one context that shares nothing."""
    rng = np.random.default_rng(0)
    starts = [rng.integers(3, 128, length + i) for i in range(groups)]
    sequences, positions = [], []
    for sample in range(samples):
        for start in starts:
            own = rng.integers(3, 128, 5 + 4 * sample)
            sequences.append(np.concatenate([start, own]))
            targets = np.arange(len(start), len(start) + len(own))
            positions.append(targets if sample else targets[[0, 2, 3]])  # turns of others lie between
    sequences.append(rng.integers(3, 128, 21))
    positions.append(np.arange(15, 21))
    return sequences, positions


def tokens_read(backbone: Backbone, score: Any) -> int:
    read = []
    handle = backbone.trunk.get_input_embeddings().register_forward_pre_hook(lambda m, x: read.append(x[0].numel()))
    score()
    handle.remove()
    return sum(read)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_states_as_from_whole_contexts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST_SAVED", 20)
    backbone = make_backbone(family)
    scorer = PrefixScorer(backbone)
    sequences, positions = contexts()
    expected, found = backbone.score(sequences, positions), scorer.score(sequences, positions)
    assert scorer._exact == (family != "mamba")
    scale = max(h.abs().max().item() for h in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * scale)


def test_the_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST_SAVED", 20)
    backbone = make_backbone("qwen3")
    backbone.max_tokens = 1000
    scorer = PrefixScorer(backbone)
    sequences, positions = contexts()
    scorer.score(sequences, positions)  # proves itself
    read = tokens_read(backbone, lambda: scorer.score(sequences, positions))
    # Two prefixes without their last id, three padded continuations of each, and the lonely context.
    assert read == (39 + 40) + 2 * 3 * (1 + 13) + 21
    assert read < 0.6 * tokens_read(backbone, lambda: backbone.score(sequences, positions))


def test_short_prefixes_are_not_worth_it_and_a_model_that_cannot_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = PrefixScorer(make_backbone("mamba"))
    sequences, positions = contexts()
    scorer.score(sequences, positions)
    assert scorer._exact is None  # never tried: 2 * 40 tokens are less than LEAST_SAVED
    monkeypatch.setattr(prefix, "LEAST_SAVED", 20)
    with caplog.at_level(logging.WARNING):
        scorer.score(sequences, positions)
    assert "mamba: prefixes are not shared" in caplog.text


def test_wrong_states_are_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(prefix, "LEAST_SAVED", 20)
    backbone = make_backbone("qwen3")
    scorer = PrefixScorer(backbone)
    plain = scorer._continue
    monkeypatch.setattr(scorer, "_continue", lambda *a: [h + 0.1 for h in plain(*a)])
    sequences, positions = contexts()
    for one, other in zip(scorer.score(sequences, positions), backbone.score(sequences, positions), strict=True):
        torch.testing.assert_close(one, other)
    assert "prefixes are not shared (difference" in caplog.text


def test_a_local_teacher_uses_it(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST_SAVED", 20)
    teacher = LocalTeacher(TeacherConfig(models["big"], name="t"))
    sequences, positions = contexts()
    asked = [TeacherContext(str(i), "t", s, p) for i, (s, p) in enumerate(zip(sequences, positions, strict=True))]
    found = asyncio.run(teacher.score(asked))
    assert teacher._scorer._exact
    for one, other in zip(found, teacher.backbone.score(sequences, positions), strict=True):
        torch.testing.assert_close(one.states, other, rtol=1e-4, atol=1e-4)
    assert asyncio.run(teacher.score([])) == []


def test_no_pass_reads_more_new_tokens_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long continuations of a short prefix take several passes; the cache holds four times as many tokens."""
    monkeypatch.setattr(prefix, "LEAST_SAVED", 20)
    backbone = make_backbone("qwen3")
    rng = np.random.default_rng(1)
    start = rng.integers(3, 128, 16)
    sequences = [np.concatenate([start, rng.integers(3, 128, 20)]) for _ in range(7)]
    positions = [np.arange(16, 36)] * 7
    expected = backbone.score(sequences, positions)
    scorer = PrefixScorer(backbone)
    scorer.score(sequences, positions)  # proves itself
    read = []
    backbone.trunk.get_input_embeddings().register_forward_pre_hook(lambda m, x: read.append(tuple(x[0].shape)))
    found = scorer.score(sequences, positions)
    assert read == [(1, 15), (3, 21), (3, 21), (1, 21)]  # 64 tokens at most
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
