"""Text of models, servers, files and users on a terminal: it is shown as it is, and does nothing."""

from __future__ import annotations

import io
import logging
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import ScriptedTeacher, make_config

from opdengine import cli
from opdengine.training.progress import Progress
from opdengine.workers.printing import HarmlessFormatter

EVIL = "[/x] [bold]\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202etxt [link=http://h]a[/link]"


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
        terminal.flush()
        shown = os.read(main, 1 << 16).decode()
    os.close(main)
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
