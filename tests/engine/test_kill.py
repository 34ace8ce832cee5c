"""A real run of any method that is killed at random moments ends like one that was left alone, to the last bit.

The long form, 20 kills and five resumes of every method, and 25 kills of one process and of two:
``pytest -m slow tests/engine/test_kill.py`` (some minutes); ``-k uni_opd`` takes one method.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_settings import OF_METHODS, RUNS, settings_of

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.methods import METHODS
from opdengine.models.checkpoint import list_checkpoints, step_of
from opdengine.training.run import train
from opdengine.training.run_folder import LOGS
from opdengine.training.writer import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("kill_run.py")


def run(root: Path, runs: dict[str, tuple[dict[str, Any], int]], seed: int = 0, processes: int = 1) -> dict[str, Any]:
    """Runs in ``root``, each with so many kills; what they were killed in."""
    configs, report = [], root / "killed.json"
    for name, (settings, _) in runs.items():
        configs.append(str(root / f"{name}.yaml"))
        Path(configs[-1]).write_text(yaml.safe_dump({**settings, "output_dir": str(root / name)}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    kills = [str(number) for _, number in runs.values()]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(report), *configs, "--kills", *kills, "--seed", str(seed),
         "--processes", str(processes)],
        env=environment, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    log = report.with_suffix(".log")
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.is_file() else "")
    found = json.loads(report.read_text())
    return {name: found[config]["killed"] for name, config in zip(runs, configs, strict=True)}


def assert_same_run(whole: Path, other: Path, steps: int) -> None:
    """Weights, optimiser, random states, metrics and everything that was written of the steps are the same."""
    for place in ("final", f"checkpoints/step_{steps}"):
        assert bits(whole / place) == bits(other / place), place
    ours, theirs = read_metrics(whole / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [line["step"] for line in theirs] == list(range(steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        ours_alone = ("timing/", "perf/", "debate/generated", "debate/cached", "stored/")
        same = {name for name in a if not name.startswith(ours_alone)}
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
    for log in LOGS:
        files = [{p.name: p.read_bytes() for p in (folder / log).glob("*")} for folder in (whole, other)]
        assert files[0] == files[1], log
    assert not [p for p in other.rglob("*") if "partial" in p.name or p.name.startswith(".step")]


def bits(folder: Path) -> dict[str, bytes]:
    """Every file of a model or checkpoint but its state, which holds times, and the manifest, with a hash of that."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("state.json", "manifest.json"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def resumed(whole: Path, settings: dict[str, Any], step: int, root: Path) -> Path:
    """The run as it was after a step, continued from there in this process."""
    folder = Path(shutil.copytree(whole, root / f"from_{step}"))
    (folder / "config.yaml").unlink()
    for path in (folder / "final", *(c for c in list_checkpoints(folder / "checkpoints") if step_of(c) > step)):
        shutil.rmtree(path)
    config = {**settings, "output_dir": str(folder), "resume_from_checkpoint": "latest"}
    train(from_mapping(TrainConfig, config), progress=False)
    return folder


def test_no_method_is_left_out() -> None:
    assert OF_METHODS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", RUNS)
def test_every_method_is_resumed_with_the_same_bits(
    models: dict[str, str], prompt_file: str, tmp_path: Path, method: str
) -> None:
    settings = settings_of(method, models, prompt_file, steps=4)
    train(from_mapping(TrainConfig, {**settings, "output_dir": str(tmp_path / "whole")}), progress=False)
    assert_same_run(tmp_path / "whole", resumed(tmp_path / "whole", settings, 2, tmp_path), 4)


def test_killed_runs_end_with_the_same_bits(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    kills = {"mad_opd": 3, "uni_opd": 2, "sage_opd": 2, "sdft": 2}
    runs = {}
    for method, number in kills.items():
        settings = settings_of(method, models, prompt_file, steps=5)
        runs |= {f"whole_{method}": (settings, 0), f"killed_{method}": (settings, number)}
    killed = run(tmp_path, runs)
    for method, number in kills.items():
        assert len(killed[f"killed_{method}"]) == number
        assert_same_run(tmp_path / f"whole_{method}", tmp_path / f"killed_{method}", 5)


def test_a_run_of_two_processes_killed_three_times_ends_with_the_same_weights(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    settings = settings_of("mad_opd", models, prompt_file, steps=4)
    killed = run(tmp_path, {"whole": (settings, 0), "killed": (settings, 3)}, seed=3, processes=2)
    assert len(killed["killed"]) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_25_times_ends_with_the_same_weights(
    models: dict[str, str], prompt_file: str, tmp_path: Path, processes: int
) -> None:
    settings = settings_of("mad_opd", models, prompt_file, steps=36) | {"save_total_limit": 2}
    kills = run(tmp_path, {"whole": (settings, 0), "killed": (settings, 25)}, seed=1, processes=processes)
    killed = Counter(kill["phase"] for kill in kills["killed"])
    print(dict(killed))
    assert killed.total() == 25
    assert {"rollout", "debate", "weight sync", "start of saving", "files of a checkpoint"} <= killed.keys()
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 36)
    assert [p.name for p in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step_35", "step_36"]


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_every_method_killed_20_times_ends_with_the_same_bits(
    models: dict[str, str], prompt_file: str, tmp_path: Path, method: str
) -> None:
    settings = settings_of(method, models, prompt_file, steps=30) | {"save_total_limit": 2}
    kills = run(tmp_path, {"whole": (settings, 0), "killed": (settings, 20)}, seed=2)["killed"]
    print(method, dict(Counter(kill["phase"] for kill in kills)))
    assert len(kills) == 20
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 30)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_every_method_resumed_from_five_checkpoints_ends_with_the_same_bits(
    models: dict[str, str], prompt_file: str, tmp_path: Path, method: str
) -> None:
    settings = settings_of(method, models, prompt_file, steps=8)
    train(from_mapping(TrainConfig, {**settings, "output_dir": str(tmp_path / "whole")}), progress=False)
    for step in (1, 2, 3, 5, 7):
        assert_same_run(tmp_path / "whole", resumed(tmp_path / "whole", settings, step, tmp_path), 8)
