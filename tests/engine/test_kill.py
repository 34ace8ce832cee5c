"""A real run (rollouts, debates, checkpoints) that is killed at random moments ends like one that was left alone.

The long form, 25 kills of one process and of two: ``pytest -m slow tests/engine/test_kill.py`` (some minutes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_helpers import PROMPTS
from safetensors.torch import load_file

from opdengine.models.checkpoint import list_checkpoints
from opdengine.training.writer import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("kill_run.py")


def run(
    root: Path, name: str, settings: dict[str, Any], kills: int, seed: int = 0, processes: int = 1
) -> list[dict[str, Any]]:
    """A whole run in ``root/name``; what it was killed in."""
    config, report = root / f"{name}.yaml", root / f"{name}.json"
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(root / name)}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(config), str(report), "--kills", str(kills), "--seed", str(seed),
         "--processes", str(processes)],
        env=environment, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    log = report.with_suffix(".log")
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.is_file() else "")
    return json.loads(report.read_text())["killed"]


def settings_of(models: dict[str, str], prompt_file: str, steps: int) -> dict[str, Any]:
    return {
        "model": models["student"],
        "teachers": [{"model": models["big"]}, {"model": models["small"]}],
        "train_data": [prompt_file],
        "eval_data": [prompt_file],
        "eval_max_prompts": 2,
        "eval_steps": 2,
        "method": "mad_opd",
        "debate": {"max_tokens": 4, "prompts": PROMPTS},
        "per_device_train_batch_size": 3,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": steps,
        "warmup_ratio": 0.3,
        "learning_rate": 3e-3,
        "save_steps": 1,
        "save_total_limit": 2,
    }


def assert_same_run(whole: Path, killed: Path, steps: int) -> None:
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    ours, theirs = read_metrics(whole / "metrics.jsonl"), read_metrics(killed / "metrics.jsonl")
    assert [line["step"] for line in theirs] == list(range(steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        same = {name for name in a if not name.startswith(("timing/", "perf/", "debate/generated", "debate/cached"))}
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
    for step in range(1, steps + 1):
        for log in ("rollouts", "debates"):
            assert (whole / log / f"step_{step}.jsonl").read_text() == (killed / log / f"step_{step}.jsonl").read_text()
    assert [p.name for p in list_checkpoints(killed / "checkpoints")] == [f"step_{steps - 1}", f"step_{steps}"]
    left = {p.name for p in killed.iterdir()} - {p.name for p in whole.iterdir()}
    assert not {name for name in left if "partial" in name}
    assert not [p for p in (killed / "checkpoints").iterdir() if p.name.startswith(".")]


def test_a_run_killed_four_times_ends_with_the_same_weights(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    settings = settings_of(models, prompt_file, steps=6)
    assert run(tmp_path, "whole", settings, kills=0) == []
    killed = run(tmp_path, "killed", settings, kills=4, seed=0)
    assert len(killed) == 4
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 6)


def test_a_run_of_two_processes_killed_three_times_ends_with_the_same_weights(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    settings = settings_of(models, prompt_file, steps=4)
    assert run(tmp_path, "whole", settings, kills=0, processes=2) == []
    killed = run(tmp_path, "killed", settings, kills=3, seed=3, processes=2)
    assert len(killed) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_25_times_ends_with_the_same_weights(
    models: dict[str, str], prompt_file: str, tmp_path: Path, processes: int
) -> None:
    settings = settings_of(models, prompt_file, steps=36)
    assert run(tmp_path, "whole", settings, kills=0, processes=processes) == []
    kills = run(tmp_path, "killed", settings, kills=25, seed=1, processes=processes)
    killed = Counter(kill["phase"] for kill in kills)
    print(dict(killed))
    assert killed.total() == 25
    assert {"rollout", "debate", "weight sync", "start of saving", "files of a checkpoint"} <= killed.keys()
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 36)
