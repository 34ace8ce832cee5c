"""A judge that decides nothing is refused where the settings show it, and said aloud where a step does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from agent_helpers import make_rollout
from engine_helpers import ScriptedTeacher, make_config

from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.methods.checks import Watch
from opdengine.methods.sage_judge import judge_checks
from opdengine.methods.sage_opd import SAGEOPD
from opdengine.training.run import train
from opdengine.types import Batch
from tiny.agents.house import HOUSE


def test_a_judge_whose_answer_leaves_no_room_for_the_question_is_refused(
    models: dict[str, str], tmp_path: Path
) -> None:
    """By default a verdict may have 1028 tokens, which is more than this window."""
    settings: dict[str, Any] = {
        "method": "sage_opd", "environment": {"name": HOUSE, "max_turns": 2, "num_environments": 1},
        "teachers": [{"model": models["big"]}],
    }  # fmt: skip
    message = (
        r"no prompt .*fits the window of teacher 'big', which has 1024 tokens: the judge's question of \d+ tokens with "
        r"sage.judge_max_tokens=1028 takes .* lower sage.judge_max_tokens"
    )
    with pytest.raises(ConfigError, match=message):
        train(make_config(models, "", tmp_path / "run", **settings), progress=False)
    unasked = {**settings, "sage": {"use_judge": False}, "max_steps": 1, "per_device_train_batch_size": 1}
    assert train(make_config(models, "", tmp_path / "unasked", **unasked), progress=False).metrics["loss"] > 0


@pytest.mark.parametrize(
    ("reply", "window", "message"),
    [
        (
            "Let me think about it",
            None,
            "5 of 5 replies of the judge hold no single verdict and weigh sage.judge_fallback",
        ),
        ("SKIP or STRONG", None, "5 of 5 replies of the judge hold no single verdict"),
        ("SKIP", 100, "5 of 5 turns do not fit the judge's window with sage.judge_max_tokens=8"),
        ("SKIP", None, "5 of 5 turns were judged SKIP or weigh 0"),
        ("WEAK", None, ""),
    ],
)
def test_turns_without_a_verdict_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reply: str, window: int | None, message: str
) -> None:
    rollouts = [make_rollout((2, 3), name="a"), make_rollout((2, 2, 2), name="b")]
    teacher = ScriptedTeacher("t", lambda call, request: reply, window=window)
    data = {"model": "m", "teachers": [{"model": "t"}], "output_dir": "o", "method": "sage_opd"}
    run = {**data, "environment": {"name": HOUSE}, "sage": {"judge_max_tokens": 8}}
    method, found = SAGEOPD(from_mapping(TrainConfig, run)), Batch(samples=rollouts)
    method.teachers = [teacher]
    asyncio.run(method.annotate(found))
    assert found.metrics["sage/asked"] == 5
    assert [record["reply"] for record in found.records] == ["" if window else reply] * 5
    Watch(judge_checks(method.settings), tmp_path, 3).look(2, {**found.metrics, "grad_norm": 1.0})
    if not message:
        assert not caplog.messages
        return
    (line,) = caplog.messages
    assert message in line and str(tmp_path / "verdicts" / "step_2.jsonl") in line
