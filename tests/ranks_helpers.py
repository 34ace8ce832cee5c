"""Starts programs on several processes of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
STEP_WORKER = ROOT / "tests" / "distributed" / "step_worker.py"
LEARNING_RATE = 1e-2
STEP: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "max_completion_length": 7,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "adam_epsilon": 1e-2,
    "max_steps": 2,
}
"""Settings of steps that :func:`same_steps` compares."""


def torchrun(world: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``torchrun`` with gloo on the CPU; one process runs without it."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    return _python([*ranks, *arguments], environment)


def run_cases(
    cases: Mapping[str, dict[str, Any]], world: int, root: Path, *before: str, **environment: str
) -> dict[str, Any]:
    """What ``step_worker.py``, which ``before`` may start, found on ``world`` processes; ``root`` holds its files."""
    (root / f"{world}.json").write_text(json.dumps(cases))
    files = (str(root / f"{world}.json"), str(root / f"{world}.pt"))
    done = torchrun(world, *before, str(STEP_WORKER), *files, **environment)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = torch.load(files[1], weights_only=False, map_location="cpu")
    return found


def each_to_its_end(world: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Like :func:`torchrun` for a program that fails on all ranks: it is known what each of them says.

    ``torchrun`` ends the other processes as soon as one has failed, also one that is about to say why it fails.

    Returns:
        The largest status, and what the ranks printed, one after the other.
    """
    shared = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **environment}
    places = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
    with ThreadPoolExecutor(world) as pool:
        done = list(pool.map(lambda place: _python(arguments, {**shared, **place}), places))
    printed = ("".join(d.stdout for d in done), "".join(d.stderr for d in done))
    return subprocess.CompletedProcess(arguments, max(d.returncode for d in done), *printed)


def _python(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    places = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def in_processes(world: int, arguments: Callable[[int], Sequence[str]], **environment: str) -> None:
    """Run a program in one process for each rank, without torchrun; what the first that failed has printed is shown.

    Args:
        world: number of processes.
        arguments: rank -> what follows ``python``.
        environment: further variables of all of them.
    """
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(world), **environment}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments(rank)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        output = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [text for process, text in zip(running, output, strict=True) if process.returncode]
    assert not failed, failed[0][-4000:]


def free_port() -> str:
    """A port of this machine at which nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def same_steps(one: Mapping[str, Any], many: Mapping[str, Any], tolerance: float) -> None:
    """What ``step_worker.py`` found on one process and on several: gradients, weights after both steps, metrics.

    Args:
        tolerance: of gradients (times the largest entry) and metrics; weights have 10 of it, times the learning rate.
    """
    assert many["rollouts"] == one["rollouts"]
    assert many["gradients"].keys() == one["gradients"].keys()
    largest = max((g.abs().max() for g in one["gradients"].values()), default=torch.zeros(()))
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(
            many["gradients"][name], gradient, rtol=tolerance, atol=tolerance * largest.item(), msg=name
        )
    assert many["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], weight, rtol=0, atol=10 * tolerance * LEARNING_RATE, msg=name)
    for ours, theirs in zip(many["metrics"], one["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not name.startswith(("timing/", "perf/", "sampling/")):
                assert ours[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
