"""Runs whose served teacher fails, by setting: they stop with a checkpoint and resume, or go on without it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_helpers import make_config
from safetensors.torch import load_file
from teacher_helpers import Server, serve

from opdengine.cli import main
from opdengine.config.loading import to_mapping
from opdengine.config.train import TrainConfig
from opdengine.models.checkpoint import list_checkpoints
from opdengine.teachers import TeacherError
from opdengine.training.run import train
from opdengine.training.writer import read_metrics
from tiny.agents.house import HOUSE

SAY = "so it is <<CONFIDENCE=90>>"
PER_STEP = 2
"""Prompts of a step, so calls of each kind: one round of debate, one judgement."""

FAULTS = {"500": "http_500", "429": "http_429", "hang": "timeout", "half_json": "bad_json", "wrong_ids": "wrong_ids"}


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Server]:
    with serve(len(tokenizer)) as process:
        yield process


def settings(
    server: Server,
    models: dict[str, str],
    prompt_file: str,
    folder: Path,
    mode: str,
    patience: float = 30.0,
    **changes: Any,
) -> TrainConfig:
    """MAD-OPD with a served and a local teacher, three steps, no regular checkpoints."""
    teacher = {"name": "served", "model": "tiny", "base_url": server.url, "tokenizer": models["big"],
               "score_top_k": 8, "max_retries": 0, "timeout": patience}  # fmt: skip
    data = {
        "method": "mad_opd", "teachers": [teacher, {"name": "local", "model": models["small"]}],
        "debate": {"rounds": 1}, "per_device_train_batch_size": PER_STEP, "max_completion_length": 4,
        "on_teacher_failure": mode,
    }  # fmt: skip
    return make_config(models, prompt_file, folder, **{**data, **changes})


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(server: Server, models: dict[str, str], prompt_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    server.control(say=SAY)
    train(settings(server, models, prompt_file, folder, "stop"), progress=False)
    assert server.seen["generate"] == 3 * PER_STEP and server.seen["score"] == 1 + 3 * PER_STEP
    assert {"teacher_kl/local", "gap/mean", "debate/confidence/served"} <= lines(folder)[0].keys()
    assert not any("teacher_failures" in key for line in lines(folder) for key in line)
    return folder


def second_step(kind: str, on: str, **fault: Any) -> list[dict[str, Any]]:
    """The fault begins with the second step (the probe is a scoring call)."""
    return [{"kind": kind, "on": on, "after": PER_STEP + (on == "score"), **fault}]


@pytest.mark.parametrize("on", ["generate", "score"])
@pytest.mark.parametrize("kind", FAULTS)
def test_stop_keeps_the_last_finished_step_and_the_run_can_be_resumed(
    server: Server, models: dict[str, str], prompt_file: str, whole: Path, tmp_path: Path, kind: str, on: str
) -> None:
    config = settings(server, models, prompt_file, tmp_path, "stop", 1.5 if kind == "hang" else 30.0)
    server.control(say=SAY, faults=second_step(kind, on))
    with pytest.raises(TeacherError, match=rf"teacher 'served' failed \({FAULTS[kind]}\)"):
        train(config, progress=False)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_1"]
    assert [line["step"] for line in lines(tmp_path)] == [1] and not (tmp_path / "final").exists()
    if (kind, on) not in (("500", "generate"), ("hang", "score")):
        return  # what follows does not depend on the fault
    server.control(say=SAY)
    train(dataclasses.replace(config, resume_from_checkpoint="latest"), progress=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    for name, expected in final(whole).items():
        torch.testing.assert_close(final(tmp_path)[name], expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("on", ["generate", "score"])
@pytest.mark.parametrize("kind", FAULTS)
def test_drop_goes_on_with_the_remaining_teacher(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path, kind: str, on: str
) -> None:
    server.control(say=SAY, faults=second_step(kind, on, times=PER_STEP))
    train(settings(server, models, prompt_file, tmp_path, "drop", 1.5 if kind == "hang" else 30.0), progress=False)
    first, second, third = lines(tmp_path)
    failures = f"teacher_failures/served/{FAULTS[kind]}"
    assert second[failures] == PER_STEP and failures not in first and failures not in third
    assert [line["completions/kept"] for line in (first, second, third)] == [PER_STEP] * 3
    assert second["loss"] > 0 and third["policy_version"] == 3
    if on == "score":
        assert "teacher_kl/served" not in second and "teacher_kl/served" in third
    else:  # it judges, but had nothing to say
        assert second["debate/empty_turn"] >= PER_STEP and "teacher_kl/served" in second
        assert second["teacher_weight/served"] == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_a_server_that_dies(
    models: dict[str, str], prompt_file: str, tokenizer: Any, whole: Path, tmp_path: Path, mode: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On the command line: one clear message, and the run goes on at another address."""
    with serve(len(tokenizer)) as server:
        server.control(say=SAY, faults=second_step("die", "score"))
        config = settings(server, models, prompt_file, tmp_path / "run", mode)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_mapping(config)))
        status = main(["train", "--config", str(tmp_path / "run.yaml")])
    captured = capsys.readouterr()
    if mode == "drop":
        assert status == 0
        _, second, third = lines(tmp_path / "run")
        assert second["teacher_failures/served/connection"] == PER_STEP
        assert third["teacher_failures/served/connection"] == 2 * PER_STEP  # it neither writes nor judges
        assert third["completions/kept"] == PER_STEP
        return
    assert status == 2 and "teacher 'served' failed (connection)" in captured.err and "Traceback" not in captured.err
    with serve(len(tokenizer)) as moved:
        moved.control(say=SAY)
        arguments = ["--resume_from_checkpoint", "latest", "--teachers.0.base_url", moved.url]
        assert main(["train", "--config", str(tmp_path / "run.yaml"), *arguments]) == 0
    for name, expected in final(whole).items():
        torch.testing.assert_close(final(tmp_path / "run")[name], expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_no_confidence_is_no_failure(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path, mode: str
) -> None:
    server.control(say="I am not telling.")
    train(settings(server, models, prompt_file, tmp_path, mode, max_steps=1), progress=False)
    (line,) = lines(tmp_path)
    assert line["debate/parse_failures"] >= PER_STEP and line["teacher_weight/served"] == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_answers_for_sequence_distillation(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path, mode: str
) -> None:
    """A prompt whose author failed is dropped, and asked again when it comes again."""
    server.control(say=SAY, faults=[{"kind": "500", "on": "generate", "after": 1 + PER_STEP, "times": 1}])
    config = settings(server, models, prompt_file, tmp_path, mode, method="mt_seqkd")
    config = dataclasses.replace(config, teachers=config.teachers[:1], max_completion_length=16)
    if mode == "stop":
        with pytest.raises(TeacherError):
            train(config, progress=False)
        assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_1"]
        return
    train(config, progress=False)
    counts = [line.get("dropped/teacher_failure", 0.0) for line in lines(tmp_path)]
    assert counts == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_episodes_that_a_served_teacher_plays(
    server: Server, models: dict[str, str], tmp_path: Path, mode: str
) -> None:
    """Two turns for each of two tasks in a step. An episode whose call failed is left out, or ends the run."""
    server.control(say="go hall", faults=[{"kind": "500", "on": "generate", "after": 1 + 2 * PER_STEP, "times": 1}])
    environment = {"name": HOUSE, "max_turns": 2, "num_environments": 2, "options": {"count": 6}}
    config = settings(server, models, "", tmp_path, mode, method="mt_seqkd", environment=environment)
    config = dataclasses.replace(config, teachers=config.teachers[:1], max_completion_length=16, log_completions=True)
    if mode == "stop":
        with pytest.raises(TeacherError):
            train(config, progress=False)
        assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_1"]
        return
    train(config, progress=False)
    assert [line.get("dropped/teacher_failure", 0.0) for line in lines(tmp_path)] == [0.0, 1.0, 0.0]
    assert [line["seqkd/written/served"] for line in lines(tmp_path)] == [2.0, 1.0, 2.0]
    (row, _) = [json.loads(line) for line in (tmp_path / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert row["text"] == "go hall\ngo hall" and row["author"] == "served" and row["tokens"] > 0


def test_a_debate_on_the_command_line(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(server, models, prompt_file, tmp_path / "run", "stop")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    arguments = ["debate", "--config", str(tmp_path / "run.yaml"), "--prompt", "What is 1 + 1?"]
    server.control(say=SAY)
    assert main(arguments) == 0
    assert f"--- round 1, served\n{SAY}\n" in capsys.readouterr().out
    server.control(faults=[{"kind": "503", "on": "generate", "after": 1}])  # the probe writes one token
    assert main(arguments) == 2
    assert "teacher 'served' failed (http_503)" in capsys.readouterr().err
