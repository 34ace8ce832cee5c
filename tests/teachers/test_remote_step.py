"""Whole steps with exact teachers elsewhere have the loss, gradients and debates of the same teachers here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import assert_same_gradients, loss_and_gradient, make_config, make_engine, make_samples
from remote_helpers import ROOT, answering, teacher_serve

from opdengine.config.loading import load_config
from opdengine.config.train import TeacherConfig, TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.teachers.remote import RemoteTeacher
from opdengine.teachers.served_model import Served
from opdengine.types import Hidden


@pytest.fixture(scope="module")
def servers(models: dict[str, str]) -> Iterator[dict[str, str]]:
    with answering(Served(models["big"])) as big, answering(Served(models["small"], max_tokens=200)) as small:
        yield {"big": big, "small": small}


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


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_bundled_teachers_debate_elsewhere_as_they_do_here(tmp_path: Path, dtype: str) -> None:
    """The configuration of the README's first run; "auto" is the float16 of the bundled files, sent as it is."""
    tiny = ROOT / "examples" / "tiny" / "models"
    names = ("teacher_convert", "teacher_compile")
    settings = ["--output_dir", str(tmp_path), "--verifier", "exact_match", "--bf16", "false"]
    config = load_config(str(ROOT / "examples" / "configs" / "tiny_mad_opd.yaml"), settings)
    near = [TeacherConfig(str(tiny / name), name=name, dtype=dtype) for name in names]
    here = dataclasses.replace(config, model=str(tiny / "student"), teachers=near)
    prompts = load_prompts([str(ROOT / "examples" / "tiny" / "train.jsonl")]).prompts[:6]
    found = []
    with ExitStack() as stack:
        urls = [[stack.enter_context(answering(Served(str(tiny / name), dtype=dtype)))] for name in names]
        if dtype == "float32":  # the first of them in a process of its own
            urls[0] = [stack.enter_context(teacher_serve(str(tiny / names[0]), "--dtype", dtype)).url]
        far = [dataclasses.replace(t, dtype="auto", hidden_states_url=u) for t, u in zip(near, urls, strict=True)]
        for one in (here, dataclasses.replace(here, teachers=far)):
            torch.manual_seed(0)
            engine = make_engine(one)
            samples = make_samples(engine, prompts)
            found.append((
                [[c.token_ids.tolist() for c in s.contexts] for s in samples],
                [s.mix.tolist() for s in samples if s.mix is not None],
                *loss_and_gradient(engine, samples),
            ))  # fmt: skip
    (read, mix, loss, gradient), (their_read, their_mix, their_loss, their_gradient) = found
    assert read == their_read and mix == their_mix and len(read) == 6
    assert their_loss == pytest.approx(loss, rel=1e-6) and loss > 0
    assert_same_gradients(their_gradient, gradient, rtol=1e-6)
