"""Trackers: the real packages, without network."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_helpers import make_config

from opdengine.config.loading import from_mapping, to_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training import trackers
from opdengine.training.run import train
from opdengine.training.run_folder import RunFolder
from opdengine.training.trackers import CHARACTERS, NOTE, ROWS, require_trackers, rows_for_table
from opdengine.training.writer import MetricsWriter, read_metrics

ROOT = Path(__file__).parents[2]
SECRET = "wb" + "0123456789abcdef" * 2 + "01234567"


def needs(package: str) -> pytest.MarkDecorator:
    """Skip without the package, and say how to get it; where CI runs it must be there."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(
        missing and not os.environ.get("CI"),
        reason=f"NOT TESTED: {package} is not installed: pip install -e '.[trackers]' (part of the extra dev)",
    )


def settings(models: dict[str, str], prompt_file: str, folder: Path, **changes: Any) -> TrainConfig:
    wanted: dict[str, Any] = {
        "method": "opd", "teachers": [{"model": models["big"]}], "eval_data": [prompt_file], "eval_max_prompts": 2,
        "eval_steps": 2, "save_steps": 1, "log_completions": True, "run_name": "first", **changes,
    }  # fmt: skip
    return make_config(models, prompt_file, folder, **wanted)


def run(config: TrainConfig, file: Path, **environment: str) -> str:
    """A run in a process of its own, as a user starts it; what it said."""
    file.write_text(yaml.safe_dump(to_mapping(config)))
    done = subprocess.run(
        [sys.executable, "-m", "opdengine", "train", "--config", str(file)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"finished: {config.output_dir}/final"  # nobody else writes there
    return done.stderr


def assert_no_secret(folder: Path) -> None:
    for file in folder.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@needs("trackio")
def test_trackio_holds_metrics_and_tables_and_a_resumed_run_goes_on_in_the_same_one(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    place = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_TOKEN": SECRET}
    config = settings(models, prompt_file, tmp_path / "run", report_to=["trackio"], project="distil", max_steps=2)
    run(config, tmp_path / "run.yaml", **place)
    longer = dataclasses.replace(config, max_steps=3, resume_from_checkpoint="latest")
    run(longer, tmp_path / "run.yaml", **place)
    question = (
        "import json, trackio\n"
        "(run,) = trackio.Api().runs('distil')\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "own = ('distil', run.name)\n"
        "print(json.dumps([run.name, SQLiteStorage.get_logs(*own), SQLiteStorage.get_run_config(*own)]))"
    )
    told = subprocess.run([sys.executable, "-c", question], env={**os.environ, **place}, capture_output=True, text=True,
                          timeout=120, check=True)  # fmt: skip
    name, rows, stored = json.loads(told.stdout.splitlines()[-1])
    assert name == json.loads((tmp_path / "run" / NOTE).read_text())["trackio"]["name"]
    assert name.startswith("first-") and stored["max_steps"] == 3
    ours = {row["step"]: row for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx({step: row["loss"] for step, row in ours.items() if "loss" in row})
    tables = {(name, row["step"]) for row in rows for name in ("completions", "evaluations") if name in row}
    assert tables == {("completions", 1), ("completions", 2), ("completions", 3),
                      ("evaluations", 0), ("evaluations", 2), ("evaluations", 3)}  # fmt: skip
    table = next(row["completions"] for row in rows if "completions" in row)
    assert "text" in json.dumps(table) and "prompt" in json.dumps(table)
    assert_no_secret(tmp_path)


@needs("wandb")
def test_wandb_holds_metrics_and_tables_and_a_resumed_run_goes_on_in_the_same_one(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    offline = {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "HOME": str(tmp_path / "home")}
    config = settings(models, prompt_file, tmp_path / "run", report_to=["wandb"], max_steps=2)
    run(config, tmp_path / "run.yaml", **offline)
    note = json.loads((tmp_path / "run" / NOTE).read_text())["wandb"]
    assert note["project"] == "opdengine"
    run(dataclasses.replace(config, max_steps=3, resume_from_checkpoint="latest"), tmp_path / "run.yaml", **offline)
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(note["id"]) for folder in folders)
    found = [record for folder in folders for record in history(next(folder.glob("*.wandb")))]
    ours = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row}
    assert {row["step"]: row["loss"] for row in found if "loss" in row} == pytest.approx(ours)
    tables = {(name.partition(".")[0], row["step"]) for row in found for name in row}
    assert {("completions", 3), ("evaluations", 0), ("evaluations", 3)} <= tables
    (file, *_) = folders[0].rglob("completions_*.table.json")
    table = json.loads(file.read_text())
    assert {"prompt", "text", "answer", "reward", "drop"} <= set(table["columns"]) and table["data"]
    assert_no_secret(tmp_path / "run")


def history(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that Weights & Biases wrote without network: records of LevelDB's log, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, data, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        data, at = data + content[at + 7 : at + 7 + length], at + 7 + length
        if kind not in (1, 4):  # a first or a middle part
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        data = b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_in_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"report_to: \[{name}\] needs a package: pip install"):
        require_trackers([name])


def test_wandb_without_a_login_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="needs a login: run 'wandb login', set WANDB_API_KEY, or set WANDB_MODE"):
        require_trackers(["wandb"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    require_trackers(["wandb"])
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(["wandb"])


@pytest.mark.parametrize("report_to", [["comet"], ["tensorboard", "tensorboard"], [""]])
def test_a_tracker_that_is_not_known_is_refused(report_to: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"report_to=.* it lists some of \['tensorboard', 'wandb', 'trackio'\]"):
        from_mapping(TrainConfig, {"model": "m", "train_data": ["d"], "output_dir": "o", "report_to": report_to})


class Broken:
    """A tracker that nobody answers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("no route")

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        raise ConnectionError("no route")

    def close(self) -> None:
        raise ConnectionError("no route")


class Seen:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.told.append((name, step, rows))

    def close(self) -> None:
        self.told.append("closed")


def test_a_tracker_that_fails_ends_no_run_and_is_told_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = Seen()
    with caplog.at_level(logging.WARNING, logger="opdengine"):
        writer = MetricsWriter(tmp_path, {"broken": Broken(), "seen": seen})
        writer.write(1, {"loss": 1.0})
        writer.table("completions", 1, [{"text": "x"}])
        writer.close()
    assert seen.told == [(1, {"loss": 1.0}), ("completions", 1, [{"text": "x"}]), "closed"]
    assert caplog.text.count("the tracker broken failed (no route)") == 1
    assert "the tracker broken failed 3 times" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_a_tracker_that_cannot_begin_ends_the_run_before_its_first_step(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("the key is\nnot valid")

    monkeypatch.setattr(trackers, "OPENED", {"tensorboard": refuse})
    config = settings(models, prompt_file, tmp_path / "run", report_to=["tensorboard"])
    with pytest.raises(ConfigError, match=r"report_to: tensorboard could not begin \(the key is not valid\)"):
        train(config, progress=False)
    assert not list((tmp_path / "run").glob("rollouts/*"))
    shutil.rmtree(tmp_path / "run")


def test_a_run_that_a_tracker_keeps_from_beginning_leaves_nothing_open(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no more room")

    first, closed = Seen(), list[object]()
    monkeypatch.setattr(trackers, "OPENED", {"tensorboard": lambda *_: first, "trackio": refuse})
    monkeypatch.setattr("opdengine.training.run.require_trackers", lambda _: None)
    monkeypatch.setattr(TransformersSampler, "close", lambda self: closed.append(self))
    config = settings(models, prompt_file, tmp_path / "run", report_to=["tensorboard", "trackio"])
    with pytest.raises(ConfigError, match=r"report_to: trackio could not begin \(no more room\)") as kept:
        train(config, progress=False)
    assert first.told == ["closed"] and len(closed) == 1
    again = RunFolder(config)  # in the same process, as in a notebook, which keeps what the error can reach
    again.claim()
    again.release()
    del kept


def test_rows_of_a_table_are_flat_and_bounded() -> None:
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": "Hi"}], "score": 1.0, "text": "x" * 9999}]
    rows += [{"score": None, "teachers": ["a", "b"]}] * ROWS
    shown = rows_for_table(rows)
    assert len(shown) == ROWS and all(list(row) == ["prompt", "score", "text", "teachers"] for row in shown)
    assert shown[0]["prompt"] == "user: Hi" and shown[0]["score"] == 1.0
    assert shown[0]["text"] == "x" * CHARACTERS + " ... (9999 characters)"
    assert shown[1] == {"prompt": None, "score": None, "text": None, "teachers": '["a", "b"]'}
