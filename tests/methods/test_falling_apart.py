"""Methods that fall apart without an error say so at the first step, or are refused by their settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import make_config

from opdengine.config.train import ConfigError, TrainConfig
from opdengine.errors import NothingTrainedError
from opdengine.methods import build_method
from opdengine.methods.uni_opd import UniOPD
from opdengine.teachers.local import LocalTeacher
from opdengine.training.run import train
from opdengine.types import Completion, Failure, Request, SamplingParams, TeacherContext

Models = dict[str, str]


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """What every teacher writes."""

    async def generate(self: Any, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        return [Completion(np.array([5]), np.zeros(1), "stop", text) for _ in requests]

    monkeypatch.setattr(LocalTeacher, "generate", generate)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("I am sure", "8 of 8 confidences could not be read, and a debate that lacks one weighs its teachers alike"),
        ("Yes. <<CONFIDENCE=95>>", "4 of 4 debates end with equal confidences, so their teachers weigh alike"),
        ("", "16 of 16 turns of debates are empty"),
    ],
)
def test_debates_whose_confidences_weigh_nothing(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, text: str, message: str,
) -> None:  # fmt: skip
    say(monkeypatch, text)
    config = make_config(models, prompt_file, tmp_path, method="mad_opd", max_steps=2, log_completions=True)
    train(config, progress=False)
    (line,) = [m for m in caplog.messages if message in m]
    assert line.startswith("WARNING, step 1: ") and str(tmp_path / "debates" / "step_1.jsonl") in line
    assert (tmp_path / "debates" / "step_1.jsonl").is_file()


def test_a_debate_that_asks_for_no_confidence_misses_none(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    say(monkeypatch, "I am sure")
    config = make_config(models, prompt_file, tmp_path, method="mad_opd", max_steps=1, debate={"use_confidence": False})
    train(config, progress=False)
    assert "confidence" not in caplog.text


def uni_config(models: Models, prompt_file: str, folder: Path, **changes: Any) -> TrainConfig:
    settings = {"num_generations": 2, "max_steps": 1, "per_device_train_batch_size": 2, "method": "uni_opd", **changes}
    advantage = {"max_gap": float("inf"), **settings.pop("advantage", {})}
    return make_config(models, prompt_file, folder, advantage=advantage, **settings)


def test_a_verifier_that_always_fails(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def grade(text, answer, messages):\n    raise KeyError('solution')\n")
    config = uni_config(models, prompt_file, tmp_path / "run", verifier=f"{broken}:grade", verifier_workers=1)
    train(config, progress=False)
    assert "WARNING, step 1: 4 of 4 completions could not be graded and count as wrong" in caplog.text
    assert "2 of 2 prompts have correct rollouts only or incorrect ones only, so margin calibration" in caplog.text


def test_gaps_that_are_all_masked(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = uni_config(models, prompt_file, tmp_path, advantage={"max_gap": 1e-6}, uni_opd={"margin": "none"})
    with pytest.raises(NothingTrainedError, match=r"tokens have a gap of advantage.max_gap or more.*raise advantage"):
        train(config, progress=False)
    assert "balancing does nothing there" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"num_generations=1 is not possible with uni_opd.margin='shift' and uni_opd.balance='group'"),
        ({"margin": "none"}, r"num_generations=1 is not possible with uni_opd.balance='group'"),
        ({"balance": "global"}, r"num_generations=1 is not possible with uni_opd.margin='shift', which"),
        ({"margin": "none", "balance": "none"}, ""),
        ({"margin_scope": "global", "balance": "global"}, ""),
    ],
)
def test_groups_of_one_compare_nothing(
    models: Models, prompt_file: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = uni_config(models, prompt_file, tmp_path, num_generations=1, uni_opd=changes)
    if not message:
        assert isinstance(build_method(config), UniOPD)
        return
    with pytest.raises(ConfigError, match=message):
        build_method(config)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"balance_ratio": 0.0}, "balance_ratio=0.0"),
        ({"balance_ratio": float("inf"), "balance": "global"}, "balance_ratio=inf"),
        ({"keep_per_prompt": 1}, "keep_per_prompt=1"),
        ({"balance_ratio": 0.0, "margin": "none"}, ""),
        ({"balance_ratio": 0.0, "balance": "none"}, ""),
        ({"keep_per_prompt": 1, "margin_scope": "global"}, ""),
    ],
)
def test_a_balance_that_leaves_the_margin_nothing_to_compare(
    models: Models, prompt_file: str, tmp_path: Path, changes: dict[str, Any], left: str
) -> None:
    config = uni_config(models, prompt_file, tmp_path, uni_opd=changes)
    if not left:
        assert isinstance(build_method(config), UniOPD)
        return
    with pytest.raises(ConfigError, match=rf"uni_opd.margin='shift' is not possible with uni_opd.{left}"):
        build_method(config)


def test_a_selection_that_leaves_nothing_out(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teachers = [{"model": models["big"], "key": ["agentic"]}, {"model": models["small"], "key": ["code"]}]
    changes: dict[str, Any] = {
        "method": "camopd",
        "teachers": teachers,
        "max_steps": 1,
        "per_device_train_batch_size": 1,
    }
    train(make_config(models, prompt_file, tmp_path / "a", camopd={"domain": ["code"]}, **changes), progress=False)
    assert "WARNING, step 1: 1 of 1 rollouts of the general branch were selected" in caplog.text
    caplog.clear()
    plain = {"domain": ["code"], "selection": "none"}
    train(make_config(models, prompt_file, tmp_path / "b", camopd=plain, **changes), progress=False)
    assert "were selected" not in caplog.text


def test_an_entropy_rule_that_tells_no_tokens_apart(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"method": "entropy_opd", "teachers": [{"model": models["big"]}], "max_steps": 1}
    train(make_config(models, prompt_file, tmp_path / "a", entropy_opd={"tau": 99.0}, **changes), progress=False)
    assert "tokens lie on one side of entropy_opd.tau=99.0, so all weigh alike" in caplog.text


def test_a_teacher_that_never_answers_beside_others(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other teacher goes on alone, which is another method."""
    plain = LocalTeacher.score

    async def score(self: LocalTeacher, contexts: Sequence[TeacherContext]) -> Any:
        return [Failure("big", "timeout")] * len(contexts) if self.name == "big" else await plain(self, contexts)

    monkeypatch.setattr(LocalTeacher, "score", score)
    metrics = train(make_config(models, prompt_file, tmp_path, max_steps=1), progress=False).metrics
    assert metrics["dropped/teacher_without_answer/big"] == 4 == metrics["completions/kept"]
    assert "WARNING, step 1: 4 of 4 rollouts were judged without a teacher whose call failed" in caplog.text


def test_a_healthy_run_is_not_warned_of(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replies = iter(f"Yes. <<CONFIDENCE={n % 7 + 60}>>" for n in range(1000))

    async def generate(self: Any, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        return [Completion(np.array([5]), np.zeros(1), "stop", next(replies)) for _ in requests]

    monkeypatch.setattr(LocalTeacher, "generate", generate)
    with caplog.at_level(logging.WARNING):
        train(make_config(models, prompt_file, tmp_path, method="mad_opd", max_steps=2), progress=False)
    assert not [message for message in caplog.messages if message.startswith("WARNING")]
