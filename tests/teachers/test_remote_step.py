"""Whole steps with exact teachers elsewhere have the loss, gradients and debates of the same teachers here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import loss_and_gradient, make_config, make_engine, make_samples
from remote_helpers import answering, teacher_serve

from opdengine.config.train import TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.teachers.remote import RemoteTeacher
from opdengine.teachers.served_model import Served
from opdengine.types import Hidden


@pytest.fixture(scope="module")
def servers(models: dict[str, str]) -> Iterator[dict[str, str]]:
    with teacher_serve(models["big"]) as big, answering(Served(models["small"], max_tokens=200)) as small:
        yield {"big": big.url, "small": small}


def elsewhere(config: TrainConfig, servers: dict[str, str], **settings: Any) -> TrainConfig:
    """The same run with its teachers behind servers."""
    moved = [
        dataclasses.replace(t, hidden_states_url=[servers[name]], **settings)
        for t, name in zip(config.teachers, ("big", "small"), strict=True)
    ]
    return dataclasses.replace(config, teachers=moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "mt_opd"},
        {"method": "mad_opd", "divergence": "jsd", "debate": {"rounds": 2, "max_tokens": 5}},
        {"method": "mt_opd", "teacher_reduction": "mixture", "divergence_temperature": 2.0, "divergence": "forward_kl"},
    ],
    ids=["opd", "debate", "mixture"],
)
def test_loss_and_gradient_are_those_of_teachers_here(
    models: dict[str, str], servers: dict[str, str], prompt_file: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = make_config(models, prompt_file, tmp_path, **changes)
    prompts = load_prompts([prompt_file]).prompts[:4]
    found = []
    for settings in (config, elsewhere(config, servers)):
        torch.manual_seed(0)
        engine = make_engine(settings)
        assert all(isinstance(t, RemoteTeacher) for t in engine.teachers) == (settings is not config)
        samples = make_samples(engine, prompts)
        assert all(isinstance(t, Hidden) for sample in samples for t in sample.teacher_targets)
        found.append(([c.token_ids.tolist() for s in samples for c in s.contexts], *loss_and_gradient(engine, samples)))
    (read, loss, gradient), (their_read, their_loss, their_gradient) = found
    assert read == their_read  # the debates, too
    assert their_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    largest = max(g.abs().max().item() for g in gradient.values())
    for name, value in gradient.items():
        torch.testing.assert_close(their_gradient[name], value, rtol=0, atol=1e-6 * max(largest, 1.0), msg=name)


def test_half_the_bytes_round_the_states_and_nothing_else(
    models: dict[str, str], servers: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    """The gradient is that of the rounded states: bfloat16 keeps 8 bits, so it moves by less than a percent."""
    config = make_config(models, prompt_file, tmp_path)
    prompts = load_prompts([prompt_file]).prompts[:4]
    found = []
    for settings in (config, elsewhere(config, servers, hidden_states_dtype="bfloat16")):
        torch.manual_seed(0)
        engine = make_engine(settings)
        samples = make_samples(engine, prompts)
        if settings is config:
            for sample in samples:
                sample.teacher_targets = tuple(Hidden(t.states.bfloat16()) for t in sample.teacher_targets)
        else:
            assert all(t.states.dtype == torch.bfloat16 for s in samples for t in s.teacher_targets)
        found.append(loss_and_gradient(engine, samples))
    (loss, gradient), (their_loss, their_gradient) = found
    assert their_loss == pytest.approx(loss, rel=2e-3)  # what was rounded may fall to the other side
    largest = max(g.abs().max().item() for g in gradient.values())
    for name, value in gradient.items():
        torch.testing.assert_close(their_gradient[name], value, rtol=0, atol=1e-2 * largest, msg=name)
