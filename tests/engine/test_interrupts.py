"""A run that is told to end saves what it has learned, and continues as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_helpers import PROMPTS
from safetensors.torch import load_file

from opdengine.cli import main
from opdengine.distributed import Ranks
from opdengine.models.checkpoint import list_checkpoints
from opdengine.models.manifest import find_damage
from opdengine.training.event_loop import run_coroutine
from opdengine.training.signals import Interrupted, Interrupts
from opdengine.training.step import Engine
from opdengine.training.writer import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(models: dict[str, str], prompt_file: str, tmp_path: Path) -> list[str]:
    """A run of four steps with debates, which saves nothing by itself."""
    settings = {
        "model": models["student"],
        "teachers": [{"model": models["big"]}, {"model": models["small"]}],
        "train_data": [prompt_file],
        "output_dir": str(tmp_path / "run"),
        "method": "mad_opd",
        "debate": {"max_tokens": 4, "prompts": PROMPTS},
        "per_device_train_batch_size": 3,
        "max_completion_length": 6,
        "max_steps": 4,
        "learning_rate": 3e-3,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["train", "--config", str(tmp_path / "run.yaml")]


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sends this process signals when a method of the engine is called for the n-th time."""

    def at(method: str, call: int, *numbers: int) -> None:
        plain, calls = getattr(Engine, method), Counter[str]()

        def wrapped(self: Engine, *args: Any, **kwargs: Any) -> Any:
            calls[method] += 1
            if calls[method] == call:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Engine, method, wrapped)

    return at


@pytest.mark.parametrize(
    ("method", "number", "saved", "said"),
    [
        ("sample", signal.SIGTERM, 2, "SIGTERM: the run ends now"),
        ("sample", signal.SIGINT, 2, "SIGINT: the run ends now"),
        ("sample", signal.SIGHUP, 2, "SIGHUP: the run ends now"),
        ("update", signal.SIGHUP, 3, "SIGHUP: the run ends when this step is finished"),
        ("annotate", signal.SIGTERM, 2, "SIGTERM: the run ends now"),
        ("update", signal.SIGTERM, 3, "SIGTERM: the run ends when this step is finished"),
        ("_optimizer_step", signal.SIGINT, 3, "SIGINT: the run ends when this step is finished"),
    ],
)
def test_the_last_whole_step_is_saved_and_the_run_continues_from_it(
    arguments: list[str], tmp_path: Path, signalled: Any, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, method: str, number: int, saved: int,
    said: str,
) -> None:  # fmt: skip
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    signalled(method, 3, number)
    assert main(arguments) == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    run = tmp_path / "run"
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == [f"step_{saved}"]
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error
    assert f"step_{saved} with --resume_from_checkpoint latest" in caplog.text and "Task" not in caplog.text
    monkeypatch.undo()
    assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 0
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_before_the_first_step_there_is_nothing_to_save(
    arguments: list[str], tmp_path: Path, signalled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    signalled("sample", 1, signal.SIGTERM)
    assert main(arguments) == 128 + signal.SIGTERM
    assert "no step was finished" in caplog.text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_interrupt_ends_the_run_at_once(
    arguments: list[str], tmp_path: Path, signalled: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    signalled("update", 2, signal.SIGINT, signal.SIGINT)
    assert main(arguments) == 128 + signal.SIGINT
    assert capfd.readouterr().err.endswith("opdengine: interrupted\n")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_under_nohup_a_closed_terminal_changes_nothing(
    arguments: list[str], tmp_path: Path, signalled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled("sample", 3, signal.SIGHUP)
        assert main(arguments) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "final").is_dir()


def test_a_run_whose_terminal_is_closed_is_saved(arguments: list[str], tmp_path: Path) -> None:
    """With its progress bar, which can be printed nowhere then."""
    child, terminal = pty.fork()
    if not child:
        paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-m", "opdengine", *arguments, "--max_steps", "9999"], environment)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step_{read_metrics(metrics)[-1]['step']}" and find_damage(saved) is None


def test_a_guarded_part_that_fails_is_over() -> None:
    interrupts, seen = Interrupts(Ranks()), list[bool]()

    def fails() -> None:
        with interrupts.whole():
            seen.append(interrupts.is_whole)
            raise RuntimeError("of the step")

    with pytest.raises(RuntimeError, match="of the step"):
        fails()
    assert seen == [True] and not interrupts.is_whole


def test_a_signal_that_comes_when_the_loop_is_closed_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, between the end of the coroutine and that of its thread."""
    plain = asyncio.run

    def slow(work: Any) -> Any:
        found = plain(work)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        return found

    def raises(*_: Any) -> None:
        raise Interrupted(signal.SIGUSR1)

    async def nothing() -> None:
        pass

    async def cell() -> None:
        monkeypatch.setattr("opdengine.training.event_loop.asyncio.run", slow)
        run_coroutine(nothing())

    before = signal.signal(signal.SIGUSR1, raises)
    try:
        with pytest.raises(Interrupted):
            plain(cell())
    finally:
        signal.signal(signal.SIGUSR1, before)
