"""The unattended GPU session runs from end to end, at tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.py"


def session(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, str(RUN), "--smoke", "--out", str(out), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    return run, json.loads(out.read_text())


def test_every_case_leaves_its_figures(tmp_path):
    run, document = session(tmp_path / "loss.json")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = document["results"]
    assert {case.split()[0] for case in results["speed"]} == {f"S{i}" for i in range(1, 8)}
    for section in ("ceilings", "correctness", "speed"):
        assert results[section]
        for case, figures in results[section].items():
            assert "error" not in figures, (case, figures)
            assert "skipped" not in figures, case
    assert all(figures["passed"] for figures in results["correctness"].values())
    for case, figures in results["speed"].items():
        for name, found in figures.items():
            assert name == "seconds" or "error" not in found, (case, name, found)
    assert "| S2 jsd | ours |" in run.stdout
    assert "correctness: passed" in run.stdout


def test_a_session_without_time_says_what_it_left_out(tmp_path):
    _, document = session(tmp_path / "loss.json", "--minutes", "0.5", "--section", "ceilings")
    cases = document["results"]["ceilings"]
    assert cases["matmul 64"] == {"skipped": "no time left"}
