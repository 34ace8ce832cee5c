"""Servers that answer what they like: every answer ends in a result or in one failure with its reason, in time."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import resource
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hostile_http import REASONS, SECRET, hostile_server, mutations
from teacher_helpers import context

from opdengine.config.train import ConfigError, TeacherConfig
from opdengine.errors import ProbeError
from opdengine.teachers.echo import Echo
from opdengine.teachers.endpoint import BadAnswer
from opdengine.teachers.server import ServedTeacher
from opdengine.types import Failure, Request, SamplingParams
from opdengine.workers.printing import harmless

IDS = [40, 41, 42, 43]
PARAMS = SamplingParams(max_tokens=5, temperature=0.7, seed=3)
MIB = 1 << 20


def teacher_at(address: str, tokenizer: Any, **settings: Any) -> ServedTeacher:
    options = {"name": "served", "timeout": 1.0, "max_retries": 0, "score_top_k": 4, **settings}
    return ServedTeacher(TeacherConfig("tiny", base_url=f"{address}/v1", **options), tokenizer, len(tokenizer),
                         stop_on_failure=False)  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_an_answer_that_nobody_should_believe(kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", SECRET)
    with hostile_server(kind) as address:
        teacher = teacher_at(
            address, tokenizer, api_key_env="KEY", timeout=10.0 if "endless" in kind or "long" in kind else 1.0
        )
        if REASONS[kind] == "timeout":
            teacher.endpoint.timeout = 0.5
        begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (failure,) = asyncio.run(teacher.generate([Request("r", tuple(IDS), seed=1)], PARAMS))
        assert isinstance(failure, Failure) and failure.reason == REASONS[kind], failure
        with pytest.raises(ProbeError) as refused:
            asyncio.run(teacher.probe(judges=True))
    assert time.monotonic() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 600 * 1024  # KiB
    for said in (str(failure), str(refused.value)):
        assert len(said) < 1000 and harmless(said) == said and SECRET not in said


WRITTEN = {"choices": [{"text": "hi", "finish_reason": "stop", "token_ids": [5, 6], "prompt_token_ids": IDS}]}
ROWS = [None, *({str(i): {"logprob": -1.0}, "7": {"logprob": -2.0}} for i in IDS[1:])]
SCORED = {"choices": [{"prompt_logprobs": ROWS, "prompt_token_ids": IDS}]}


@pytest.fixture(scope="module")
def teacher(tokenizer: Any) -> ServedTeacher:
    return teacher_at("http://127.0.0.1:9", tokenizer)


def answering(teacher: ServedTeacher, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The last element is what the server answers."""
    answers: list[Any] = [None]

    async def attempt(*_: Any) -> Any:
        return copy.deepcopy(answers[-1])

    @contextlib.asynccontextmanager
    async def client(*_: Any) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(teacher.endpoint, "_attempt", attempt)
    monkeypatch.setattr(teacher.endpoint, "_client", client)
    monkeypatch.setattr("opdengine.teachers.endpoint.logger.warning", lambda *_: None)
    return answers


def test_writing_from_any_answer(teacher: ServedTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answering(teacher, monkeypatch)

    async def run() -> None:
        for answers[-1] in (WRITTEN, *mutations(WRITTEN)):
            if not isinstance(answers[-1], dict):
                continue
            (got,) = await teacher.generate([Request("r", tuple(IDS), seed=1)], PARAMS)
            if isinstance(got, Failure):
                assert got.reason in ("bad_answer", "wrong_ids") and len(str(got)) < 500
            else:
                assert isinstance(got.text, str) and got.token_ids.dtype == np.int64 and got.token_ids.ndim == 1
                got.text.encode()

    asyncio.run(run())


def test_judging_from_any_answer(teacher: ServedTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answering(teacher, monkeypatch)

    async def run() -> None:
        for answers[-1] in (SCORED, *mutations(SCORED)):
            if not isinstance(answers[-1], dict):
                continue
            (got,) = await teacher.score([context(IDS, 3)])
            if isinstance(got, Failure):
                assert got.reason in ("bad_answer", "wrong_ids", "no_logprobs", "bad_logprobs") and len(str(got)) < 500
            else:
                listed = got.ids >= 0
                assert np.isfinite(got.logprobs[listed]).all() and (got.logprobs[listed] <= 0).all()
                assert got.ids[:, 0].tolist() == IDS[1:]

    asyncio.run(run())


def test_echoes_of_any_kind(tokenizer: Any) -> None:
    names = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    echo = Echo(names, {name: i for i, name in enumerate(names) if names.count(name) == 1})
    listed = [None, *({names[i]: -1.0, "?": -2.0} for i in IDS[1:])]
    whole = {
        "logprobs": {"tokens": [names[i] for i in IDS], "token_logprobs": [None, -1, -1, -1], "top_logprobs": listed}
    }
    assert echo.translate(whole, IDS)["prompt_logprobs"][1]["41"] == {"logprob": -1}
    for choice in mutations(whole):
        if isinstance(choice, dict):
            try:
                echo.translate(choice, IDS)
            except BadAnswer as error:
                assert error.reason in ("no_logprobs", "wrong_ids")  # noqa: PT017


LISTING = {"data": [{"id": "tiny", "max_model_len": 100}]}


def test_a_listing_of_any_kind(teacher: ServedTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answering(teacher, monkeypatch)
    for answers[-1] in mutations(LISTING):
        if isinstance(answers[-1], dict):
            with pytest.raises(ProbeError) as refused:  # what it says of models is no completion either
                asyncio.run(teacher.probe(judges=False))
            assert len(str(refused.value)) < 700 and "served" in str(refused.value)


@pytest.mark.parametrize("key", ["two words", "line\n", "na\xefve", "\x1b[31m", "tab\t"])
def test_a_key_that_cannot_be_sent(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("KEY", key)
    with pytest.raises(ConfigError, match="'KEY' named by api_key_env holds a blank or another character") as refused:
        teacher_at("http://127.0.0.1:9", tokenizer, api_key_env="KEY")
    assert key not in str(refused.value)


def test_a_fair_answer_is_never_too_large() -> None:
    """Bounds grow with what was asked for."""
    from opdengine.teachers.endpoint import most_bytes

    entry = len('"123456": {"logprob": -12.345678901234567, "rank": 123, "decoded_token": "\\u4f60\\u597d\\u4f60"}, ')
    assert most_bytes({"prompt": [1] * 32_000, "max_tokens": 1, "prompt_logprobs": 64}) > 32_000 * 65 * entry
    assert most_bytes({"prompt": [1] * 100, "max_tokens": 50_000}) > 50_000 * 100
