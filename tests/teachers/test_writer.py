"""A local teacher whose text a server writes: it judges exactly, by its own hidden states."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_config, make_engine
from teacher_helpers import Server, context

from opdengine.config.train import ConfigError, TeacherConfig
from opdengine.data.prompts import load_prompts
from opdengine.errors import ProbeError
from opdengine.teachers.local import LocalTeacher
from opdengine.training.build_teachers import _as_served

SAY = "written by the server <<CONFIDENCE=80>>"


def teachers(models: dict[str, str], server: Server, **settings: Any) -> list[dict[str, Any]]:
    writer = {"writer_base_url": server.url, "writer_model": "tiny", **settings}
    return [{"model": models["big"], **writer}, {"model": models["small"], **writer}]


def test_the_server_writes_and_the_weights_here_judge(
    models: dict[str, str], bigrams: Server, prompt_file: str, tmp_path: Path
) -> None:
    bigrams.control(say=SAY)
    debate = {"rounds": 2, "max_tokens": 40}
    config = make_config(
        models, prompt_file, tmp_path, method="mad_opd", debate=debate, teachers=teachers(models, bigrams)
    )
    engine = make_engine(config)
    assert bigrams.seen["score"] == 0  # nor was it asked whether it could
    asked = bigrams.seen["generate"]
    result = asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:2]))
    assert bigrams.seen["generate"] - asked == 2 * 2 * 2  # prompts, rounds, teachers
    assert bigrams.seen["score"] == 0
    assert all(SAY in str(record) for record in result.records) and len(result.records) == 2
    assert np.isfinite(result.metrics["loss"])
    # The judgement is that of the weights here: it knows more than a list of the likeliest tokens.
    alone = LocalTeacher(TeacherConfig(models["big"], name="t"))
    ids = list(range(4, 30))
    (mine,) = asyncio.run(engine.teachers[0].score([context(ids, 3)]))
    (theirs,) = asyncio.run(alone.score([context(ids, 3)]))
    torch.testing.assert_close(mine.states, theirs.states, rtol=0, atol=0)  # type: ignore[union-attr]
    assert engine.teachers[0].fingerprint != alone.fingerprint


def test_its_failures_are_counted_and_its_window_counts(
    models: dict[str, str], bigrams: Server, prompt_file: str, tmp_path: Path
) -> None:
    bigrams.control(say=SAY, window=200)
    config = make_config(
        models, prompt_file, tmp_path, method="mad_opd", debate={"rounds": 1, "max_tokens": 8},
        teachers=teachers(models, bigrams, max_retries=0), on_teacher_failure="drop",
    )  # fmt: skip
    engine = make_engine(config)
    assert [t.window for t in engine.teachers] == [199, 199]
    bigrams.control(say=SAY, faults=[{"kind": "500", "times": 1}])
    result = asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:1]))
    failures = {k: v for k, v in result.metrics.items() if k.startswith("teacher_failures/")}
    assert sum(failures.values()) == 1.0
    assert result.metrics["debate/empty_turn"] == 1.0


def test_a_writer_that_is_not_there_is_found_out_first(
    models: dict[str, str], bigrams: Server, prompt_file: str, tmp_path: Path
) -> None:
    missing = teachers(models, bigrams, writer_model="another")
    with pytest.raises(ProbeError, match="does not serve 'another'"):
        make_engine(make_config(models, prompt_file, tmp_path, teachers=missing))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"writer_model": "x"}, r"writer_model='x' is not possible; set writer_base_url too"),
        ({"writer_base_url": "host:80"}, r"writer_base_url='host:80' is not possible; give a URL"),
        ({"writer_base_url": "http://u:p@h/v1"}, r"writer_base_url looks like a secret or holds a credential"),
        ({"writer_base_url": "http://h/v1", "base_url": "http://h/v1"}, r"writer_base_url=.* writes there anyway"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    models: dict[str, str], prompt_file: str, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(models, prompt_file, tmp_path, teachers=[{"model": models["big"], **settings}])


@pytest.mark.parametrize("place", [{"offload": True}, {"shard": True}, {}])
def test_where_the_weights_here_lie_does_not_matter_at_the_endpoint(place: dict[str, Any]) -> None:
    teacher = TeacherConfig("t", name="t", writer_base_url="http://h/v1", writer_model="served", **place)
    assert _as_served(teacher) == TeacherConfig("served", name="t", base_url="http://h/v1", tokenizer="t")
