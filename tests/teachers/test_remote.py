"""Exact teachers elsewhere judge and write what the same teacher does in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import full_logprobs
from remote_helpers import TeacherServer, contexts, remote, teacher_serve

from opdengine.config.train import TeacherConfig
from opdengine.teachers.local import LocalTeacher
from opdengine.types import Completion, Hidden, Request, SamplingParams


@pytest.fixture(scope="module")
def server(models: dict[str, str]) -> Iterator[TeacherServer]:
    with teacher_serve(models["big"], "--max_tokens_per_batch", "64") as process:
        yield process


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_it_judges_as_a_local_teacher_does(models: dict[str, str], server: TeacherServer, dtype: str) -> None:
    teacher, here = (
        remote(models["big"], server.url, hidden_states_dtype=dtype),
        LocalTeacher(TeacherConfig(models["big"], name="t")),
    )
    asyncio.run(teacher.probe(judges=True))
    assert teacher.window == here.window and teacher.head is not None
    torch.testing.assert_close(teacher.head.weight, here.head.weight, rtol=0, atol=0)
    judged, expected = asyncio.run(teacher.score(contexts())), asyncio.run(here.score(contexts()))
    for mine, theirs in zip(judged, expected, strict=True):
        assert isinstance(mine, Hidden)
        rounded = theirs.states.bfloat16() if dtype == "bfloat16" else theirs.states
        torch.testing.assert_close(mine.states, rounded, rtol=1e-5 if dtype != "bfloat16" else 2**-7, atol=1e-5)


def test_it_writes_as_a_local_teacher_does(models: dict[str, str], server: TeacherServer) -> None:
    teacher, here = remote(models["big"], server.url), LocalTeacher(TeacherConfig(models["big"], name="t"))
    asyncio.run(teacher.probe(judges=False))
    assert teacher.head is None
    requests = [Request(f"r{n}", tuple(range(40, 46 + n)), n) for n in range(6)]
    params = SamplingParams(max_tokens=30, temperature=0.7, top_p=0.9, top_k=50, seed=3)
    for mine, theirs in zip(
        asyncio.run(teacher.generate(requests, params)), asyncio.run(here.generate(requests, params)), strict=True
    ):
        assert isinstance(mine, Completion) and isinstance(theirs, Completion)
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert (mine.text, mine.stop_reason) == (theirs.text, theirs.stop_reason)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-5)


def test_its_log_probs_are_those_of_the_model(models: dict[str, str], server: TeacherServer, tokenizer: Any) -> None:
    """States and head that have travelled, against the logits of the whole model in float64."""
    teacher = remote(models["big"], server.url)
    asyncio.run(teacher.probe(judges=True))
    for context, found in zip(contexts(), asyncio.run(teacher.score(contexts())), strict=True):
        assert isinstance(found, Hidden) and teacher.head is not None
        logprobs = teacher.head.logits(found.states)[:, : len(tokenizer)].double().log_softmax(-1)
        expected = full_logprobs(models["big"], context.token_ids.tolist(), context.target_positions, len(tokenizer))
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
