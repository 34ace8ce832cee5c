"""Starts programs on several processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(world: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``torchrun`` with gloo on the CPU; one process runs without it."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    places = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, *ranks, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
