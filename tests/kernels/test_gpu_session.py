"""The unattended GPU session runs from end to end, at tiny sizes on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd_kernels import sampling

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.py"
CASES = Path(__file__).with_name("gpu_kernel_cases.py")


def session(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, str(RUN), "--smoke", "--out", str(out), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    return run, json.loads(out.read_text())


@pytest.mark.slow
def test_every_case_leaves_its_figures(tmp_path):
    """Both halves; the second adds to the file of the first."""
    for half in ((), ("--more",)):
        run, document = session(tmp_path / "loss.json", *half)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = document["results"]
    assert {case.split()[0] for part in ("speed", "shapes") for case in results[part]} == {f"S{i}" for i in range(1, 8)}
    every = ("gate", "ceilings", "speed", "liger", "correctness", "step", "engine", "shapes", "peers", "screened")
    for section in (*every, "sanitizer"):
        assert results[section]
        for case, figures in results[section].items():
            assert "error" not in figures, (case, figures)
            assert "skipped" not in figures, case
    assert all(figures["passed"] for s in ("gate", "correctness", "engine") for figures in results[s].values())
    for case, figures in (c for part in ("speed", "liger", "shapes", "peers") for c in results[part].items()):
        for name, found in figures.items():
            assert name == "seconds" or "error" not in found, (case, name, found)
    assert "| S2 jsd | ours |" in run.stdout
    assert "correctness: passed" in run.stdout
    losses = [figures["loss"] for case, figures in results["step"].items() if case.startswith("update")]
    assert len(losses) == 3 and max(losses) - min(losses) <= 1e-5 * max(losses)
    for part, peer in (("speed", "trl"), ("liger", "liger")):
        assert f"ours at the memory of {peer}" in results[part]["S1 reverse_kl"]
        assert any(
            name.startswith(f"ours at the memory of {peer}, ")
            for name in results["peers"]["S1 jsd, peers at their best"]
        )
    assert "| as fast as TRL at its best chunk and at its memory, times | 1.3 or more: it computes" in run.stdout
    lines = [line for line in run.stdout.splitlines() if "at its best chunk" in line]
    assert len(lines) == 2 and not any("not measured" in line for line in lines)
    # A target is either read from the file or named as open.
    assert "| half of the rows masked, over all rows | at most 0.55 | not measured" not in run.stdout
    assert "| gap-domain GEMM over the library | time 1.1 to 1.3 | not measured" in run.stdout


@pytest.fixture
def broken_peers(monkeypatch):
    """TRL and Liger are found, and cannot be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    for name in ("trl", "trl.kernels", "liger_kernel", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, name, None)
    providers = importlib.import_module("providers")
    monkeypatch.setattr(providers, "available", lambda: {"trl": True, "liger": True})


def test_a_broken_peer_ends_nothing(broken_peers):
    """Ours has its figures, the peer its error, in every kind of case."""
    speed, correctness = importlib.import_module("speed"), importlib.import_module("correctness")
    problems = importlib.import_module("problems")
    shape = problems.S1.smaller()
    compared = speed.compare(shape, "reverse_kl", ["trl", "ours", "gemms", "liger"], None, True)
    best = speed.at_their_best(shape, "jsd", None, True)
    assert compared["ours"]["ms"] > 0 and best["ours"]["ms"] > 0
    assert "ModuleNotFoundError" in compared["trl"]["error"] and "error" in compared["liger"]
    assert any("error" in figures for name, figures in best.items() if name.startswith("trl, "))
    problem = problems.neighbours(shape, "cpu", torch.float32, 0.2)
    checked = correctness.compare(problem, "reverse_kl", ["ours", "trl", "liger"])
    assert checked["passed"] and "error" in checked["trl"] and "error" in checked["liger"]


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_the_check_of_sampled_columns_sees_a_bias(kind, monkeypatch):
    """Columns that are drawn a fifth too seldom fail it; as they are drawn they pass."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    correctness, problems = importlib.import_module("correctness"), importlib.import_module("problems")
    problem = problems.peaked(problems.S1.smaller(), "cpu", torch.float32)
    assert correctness.sampled(problem, kind, 0.2)["passed"]
    uniforms = sampling.uniforms
    monkeypatch.setattr(sampling, "uniforms", lambda *arguments: 1.2 * uniforms(*arguments))
    assert not correctness.sampled(problem, kind, 0.2)["passed"]


def test_pages_and_figure_of_a_result(tmp_path, monkeypatch):
    """What ``report.py`` makes of a file of the session."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    report, gpu_tables = importlib.import_module("report"), importlib.import_module("gpu_tables")
    figures = {"ms": 40.0, "iqr": 0.1, "peak_bytes": 2e9, "of_floor": 0.9}
    case = {"ours": figures, "gemms": {**figures, "ms": 38.0}, "trl": {**figures, "ms": 80.0}}
    speed = {"S1 reverse_kl": case | {"ours at the memory of trl": {**figures, "ms": 42.0}}, "S7 reverse_kl": case}
    document = {"device": "some_gpu", "driver": "1.0", "smoke": False, "results": {"speed": speed}}
    file = tmp_path / "benchmarks" / "results" / "some_gpu" / "loss.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(document))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tables, "ROOT", tmp_path)
    row = "| 8192 tokens, half of them masked, 2560 <- 4096, V = 151936, reverse KL | 40.0 ms | 90 % | 0.95× | 2.00× |"
    assert row in report.loss()
    page = gpu_tables.gpu()
    assert "some gpu, driver 1.0" in page
    assert "| as fast as TRL 1.16 at its memory, times | at least 1.8 | 1.90 | yes |" in page
    assert "| half of the rows masked, over all rows | at most 0.55 | 1.00 | no |" in page
    assert "| as fast as Liger 0.8.5 at its memory, times | at least 2.5 | not measured | |" in page
    report.draw_loss(report.loss_results(), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_benchmarks_print_a_verdict_for_every_figure(tmp_path):
    """One that is no worse than allowed, one that is, and one without a baseline, which fails nothing."""
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "def test_ok(guard):\n    guard('one', {'ratio': (1.1, 0.3)}, tokens_per_second=123.0)\n"
        "def test_worse(guard):\n    guard('two', {'ratio': (1.4, 0.3)})\n"
        "def test_new(guard):\n    guard('three', {'ratio': (9.0, 0.3)})\n"
    )
    known = tmp_path / "baselines" / f"cpu_{torch.get_num_threads()}_threads" / "it.json"
    known.parent.mkdir(parents=True)
    known.write_text(json.dumps({"results": {"one": {"ratio": 1.0}, "two": {"ratio": 1.0}}}))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    words = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert "one ratio 1.1 1 1.3 ok 123" in words and "two ratio 1.4 1 1.3 WORSE -" in words, run.stdout + run.stderr
    assert "three ratio 9 - - NO BASELINE -" in words
    assert any(line.startswith("1 of 3 figures have NO BASELINE on cpu_") for line in words)
    assert "1 failed, 2 passed" in run.stdout


def test_kernels_of_the_session():
    """The interpreter is chosen when Triton is imported, so the cases need their own process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", CASES]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_models_of_the_whole_step(monkeypatch):
    """The published sizes, without their memory."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    models = importlib.import_module("models")
    for shape, billions in ((models.QWEN3_4B, 4.02), (models.QWEN3_8B, 8.19), (models.QWEN3_14B, 14.77)):
        model = models.make_model(shape, models.REAL.vocab, torch.bfloat16, "meta")
        assert round(models.parameters(model) / 1e9, 2) == billions


def test_a_session_without_time_says_what_it_left_out(tmp_path):
    _, document = session(tmp_path / "loss.json", "--minutes", "0.5", "--section", "ceilings")
    cases = document["results"]["ceilings"]
    assert cases["matmul 64"] == {"skipped": "no time left"}
