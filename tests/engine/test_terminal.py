"""Text of models, servers, files and users on a terminal: it is shown as it is, and does nothing."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import ScriptedTeacher, make_config

from opdengine import cli
from opdengine.training.progress import Progress
from opdengine.types import Prompt, Sample, Turn
from opdengine.workers.printing import HarmlessFormatter

EVIL = "[/x] [bold]\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202etxt [link=http://h]a[/link]"


def everything(main: int) -> str:
    """What was written to a terminal whose other side is closed; it comes in pieces."""
    found = b""
    with contextlib.suppress(OSError), os.fdopen(main, "rb", buffering=0) as end:
        while piece := end.read(1 << 16):
            found += piece
    return found.decode()


def test_log_lines_are_harmless() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "said %s", (EVIL,), None)
    handler.emit(record)
    line = stream.getvalue()
    assert not set("\x1b\x07\x9b\r\u202e") & set(line) and r"\x1b]0;owned\x07" in line and "[/x] [bold]" in line


def test_a_run_may_be_called_anything(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar of a terminal takes square brackets for markup, unless it is told not to."""
    config = make_config(models, prompt_file, tmp_path, run_name=EVIL)
    main, side = pty.openpty()
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "300")
        with Progress(config, 0) as bar:
            metrics = {"loss": 1.0, "eval/[/y]\x1b[5m/success": 0.5}
            bar.advance(1, metrics, metrics)
            bar._bar.refresh()
    shown = everything(main)
    assert "[/x] [bold]" in shown and "[/y]" in shown and "[link=http://h]a[/link]" in shown
    assert "\x1b]0;owned" not in shown and "\x1b[5m" not in shown and "\x1b[2J" not in shown and "\u202e" not in shown


def test_a_debate_is_printed_harmless(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = iter(["a[/x]", "b\x1b[31m"])
    monkeypatch.setattr(
        "opdengine.teachers.local.LocalTeacher", lambda *_, **__: ScriptedTeacher(next(names), lambda *_: EVIL)
    )
    config = make_config(models, prompt_file, tmp_path, debate={"rounds": 1})
    assert cli._debate(config, "what?", "") == 0
    shown = capsys.readouterr().out
    assert "a[/x]" in shown and "[/x] [bold]" in shown and not set("\x1b\x07\x9b\r\u202e") & set(shown)


def test_errors_are_harmless(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise ValueError(EVIL)

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["train"]) == 2
    assert not set("\x1b\x07\x9b\r\u202e") & set(capsys.readouterr().err)


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "opdengine: No space left on device\n"


def test_output_that_a_terminal_cannot_encode_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli._prepare_output()
    cli._say("naïve")
    sys.stdout.flush()
    assert raw.getvalue() == b"na\\xefve\n"


def sample(text: str, drop: str = "", reward: float | None = None) -> Sample:
    turns = (Turn("prompt", np.array([1])), Turn("assistant", np.array([2, 3]), trains=True))
    return Sample("0.0", Prompt("p 1", ()), turns, text=text, drop=drop, reward=reward)


def test_log_lines_are_written_above_the_bar(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line never lands in the middle of the bar, and afterwards the handler writes where it did before."""
    main, side = pty.openpty()
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "xterm")
        handler = logging.StreamHandler()
        handler.setFormatter(HarmlessFormatter("%(message)s"))
        root = logging.getLogger()
        monkeypatch.setattr(root, "handlers", [handler])
        monkeypatch.setattr(root, "level", logging.INFO)
        with Progress(make_config(models, prompt_file, tmp_path), 0) as bar:
            bar.advance(1, {"loss": 1.0}, {"loss": 1.0})
            bar._bar.refresh()
            logging.getLogger("opdengine.x").warning("WATCH OUT [/x] \x1b[2J")
            bar._bar.refresh()
        assert handler.stream is terminal
    shown = everything(main)
    (line,) = [part for part in shown.split("\n") if "WATCH OUT" in part]
    written = line.rstrip("\r").split("\x1b[2K")[-1].removeprefix("\r")
    assert written.startswith("WATCH OUT [/x] \\x1b[2J") and "1/3" not in written


def test_plain_lines_tell_time_speed_and_what_matters(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = make_config(models, prompt_file, tmp_path, max_steps=4, print_completions_steps=2)
    values = {"loss": 0.5, "teacher_kl/a": 0.2, "teacher_kl/b": 0.4, "learning_rate": 1e-5, "timing/step": 2.5,
              "perf/tokens_per_second": 120.0, "gap/mean": -0.3}  # fmt: skip
    with Progress(config, 0) as bar:
        for step in range(1, 5):
            bar.advance(step, values, values, [sample("gone", "empty"), sample(f"said {step}\x1b[2J", reward=1.0)])
    lines = [record.getMessage() for record in caplog.records]
    assert [f"mt_opd step {n}/4" in lines[i] for n, i in ((1, 0), (2, 1), (3, 3), (4, 4))] == [True] * 4
    assert "ETA" in lines[0] and "ETA" not in lines[4]
    assert "loss 0.5  KL 0.3  s/step 2.5  lr 1e-05  tok/s 120" in lines[0] and "gap" not in lines[0]
    assert [i for i, line in enumerate(lines) if "prompt p 1" in line] == [2, 5]
    assert lines[2] == "step 2, prompt p 1, reward 1: said 2\\x1b[2J"


def test_the_surrogate_of_a_policy_gradient_is_not_shown(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    values = {"loss": -5.0, "teacher_kl/a": 0.2, "gap/mean": -0.3, "advantage/tokens": 9.0}
    for mode in ("sampled", "full_vocab"):
        with Progress(make_config(models, prompt_file, tmp_path, advantage={"kl_mode": mode}), 0) as bar:
            bar.advance(1, values, values)
    sampled, exact = (record.getMessage() for record in caplog.records)
    assert "gap -0.3  KL 0.2" in sampled and "loss" not in sampled
    assert "loss -5  KL 0.2" in exact


def test_a_summary_tells_before_and_after_and_what_was_dropped(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    with Progress(make_config(models, prompt_file, tmp_path), 2, enabled=False) as bar:
        bar.advance(2, {"eval/accuracy": 0.25, "eval/mean_length": 3.0}, {})
        for step, accuracy in ((3, 0.5), (4, 0.75)):
            values = {"eval/accuracy": accuracy, "dropped/empty": 2.0, "completions/sampled": 8.0,
                      "timing/rollout": 3.0, "timing/update": 1.0, "loss": float("nan")}  # fmt: skip
            bar.advance(step, values, values)
    text = "\n".join(bar.summary(tmp_path))
    assert "mt_opd: 2 steps in" in text and "rollout 75%, update 25%" in text
    assert "eval/accuracy: 0.25 -> 0.75" in text and "mean_length" not in text
    assert "rollouts: 16; dropped: empty 4" in text
    assert f"opdengine report {tmp_path} shows them" in text and str(tmp_path / "final") in text


@pytest.mark.parametrize(("method", "word"), [("mt_opd", "contexts"), ("mad_opd", "debate")])
def test_a_summary_names_a_debate_only_where_teachers_debate(
    models: dict[str, str], prompt_file: str, tmp_path: Path, method: str, word: str
) -> None:
    with Progress(make_config(models, prompt_file, tmp_path, method=method), 0, enabled=False) as bar:
        values = {"timing/debate": 1.0, "timing/update": 3.0}
        bar.advance(1, values, values)
    assert f"update 75%, {word} 25%" in bar.summary(tmp_path)[0]


def test_a_run_that_had_been_finished_says_so(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    with Progress(make_config(models, prompt_file, tmp_path), 3, enabled=False) as bar:
        pass
    first, files = bar.summary(tmp_path)
    assert first == "mt_opd: no step was left to do: 3 of 3 had been done before" and str(tmp_path / "final") in files
