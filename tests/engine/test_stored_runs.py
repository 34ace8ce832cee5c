"""Whole runs that read from disk what teachers have said: scored beforehand, killed, by several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks_helpers import in_processes
from run_settings import settings_of
from test_kill import ROOT, assert_same_run

from opdengine import cli
from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.tools.score import score_given
from opdengine.training.run import train
from opdengine.training.writer import read_metrics

Models = dict[str, str]


def settings(models: Models, file: str, store: Path, steps: int = 6, lmbda: float = 0.0) -> dict[str, Any]:
    """Two teachers, and answers of the data; three of twelve prompts are a step."""
    teachers = [{"model": models[name], "name": name, "stored": str(store)} for name in ("big", "small")]
    mixture = {"lmbda": lmbda, "completion_column": "answer", "sft_alpha": 0.5}
    own = {"teachers": teachers, "gkd": mixture, "lora": None}
    return settings_of("mt_opd", models, file, steps) | own


def written(settings: dict[str, Any], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "run")}))
    return str(file)


def only(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "teachers": [{**teacher, "stored_only": True} for teacher in settings["teachers"]]}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_a_run_after_score_asks_no_teacher(
    models: Models,
    prompt_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The losses are those of a run whose teachers judge, and neither of them is loaded."""
    plain = settings(models, prompt_file, tmp_path / "store")
    live = {**plain, "teachers": [{k: v for k, v in t.items() if k != "stored"} for t in plain["teachers"]]}
    train(from_mapping(TrainConfig, {**live, "output_dir": str(tmp_path / "live")}), progress=False)
    file = written(only(plain), tmp_path / "offline")
    with pytest.raises(ConfigError, match="'opdengine score' first"):
        train(from_mapping(TrainConfig, {**only(plain), "output_dir": str(tmp_path / "early")}), progress=False)
    assert cli.main(["score", "--config", file]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == found["stored/misses/big"] == found["stored/misses/small"] == 12
    assert found["stored/bytes/big"] > 12 * 2 * 64 * 4
    again = score_given(from_mapping(TrainConfig, yaml.safe_load(Path(file).read_text())))
    assert again["stored/hits/big"] == 12 and "stored/misses/big" not in again
    monkeypatch.setattr("opdengine.training.build_teachers.LocalTeacher", None)
    assert cli.main(["train", "--config", file]) == 0
    assert losses(tmp_path / "offline" / "run") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    lines = read_metrics(tmp_path / "offline" / "run" / "metrics.jsonl")
    assert sum(line.get("stored/hits/big", 0) for line in lines) == 6 * 3
    assert not any("stored/misses/big" in line for line in lines)


KILLED = """
import os, signal, sys
from pathlib import Path
from opdengine import cli
plain, begun = Path.open, []
def opened(self, *arguments, **options):
    if self.suffix == ".index" and arguments == ("ab",):
        begun.append(self)
        if len(begun) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *arguments, **options)
Path.open = opened
cli.main(["train", "--config", sys.argv[1]])
"""


def test_a_run_that_is_killed_while_it_stores_ends_with_the_same_bits(
    models: Models, prompt_file: str, tmp_path: Path
) -> None:
    """Its bytes were written, and not yet the line of the index: that step judges its answers again.

    Those of the teacher before it are stored by now, and what the student sampled is judged as if they were not.
    """
    whole, killed = (settings(models, prompt_file, tmp_path / f"store_{name}", 5, 0.5) for name in ("whole", "killed"))
    train(from_mapping(TrainConfig, {**whole, "output_dir": str(tmp_path / "whole")}), progress=False)
    file = written(killed, tmp_path / "killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", KILLED, file], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    more = {"output_dir": str(tmp_path / "killed" / "run"), "resume_from_checkpoint": "latest"}
    train(from_mapping(TrainConfig, {**killed, **more}), progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed" / "run", 5)
    sizes = [sum(f.stat().st_size for f in (tmp_path / s).rglob("*.data")) for s in ("store_whole", "store_killed")]
    assert sizes[1] > sizes[0]


def test_two_processes_score_for_one(models: Models, prompt_file: str, tmp_path: Path) -> None:
    plain = settings(models, prompt_file, tmp_path / "store", 3)
    file = written(plain, tmp_path / "ranks")
    in_processes(
        2, lambda rank: ["-m", "opdengine", "score", "--config", file], MASTER_ADDR="127.0.0.1", MASTER_PORT=port()
    )
    assert len(list((tmp_path / "store").rglob("*.index"))) == 4
    train(from_mapping(TrainConfig, {**only(plain), "output_dir": str(tmp_path / "one")}), progress=False)
    assert len(losses(tmp_path / "one")) == 3


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": [{"model": "big"}]}, "no teacher has a folder"),
        ({"teachers": "self"}, "a teacher is the student itself"),
        ({"gkd": {"lmbda": 0.5, "seq_kd": True}}, "gkd.seq_kd=True is not possible"),
        ({"train_data": []}, r"train_data=\[\] is not possible"),
    ],
)
def test_score_refuses_what_cannot_be_scored(
    models: Models, prompt_file: str, tmp_path: Path, change: Any, message: str
) -> None:
    plain = settings(models, prompt_file, tmp_path / "store")
    if change.get("teachers") == "self":
        change = {"teachers": [*plain["teachers"], {"model": "self", "weights": "base"}]}
    config = from_mapping(TrainConfig, {**plain, **change, "output_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=message):
        score_given(config)
