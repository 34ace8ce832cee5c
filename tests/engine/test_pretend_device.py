"""The engine on a device that only says it is one: ``pretend_cases.py`` in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("pretend_cases.py")
GROUPS = [
    "not run_of_every_method",
    "run_of_every_method and camopd",
    pytest.param("run_of_every_method", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("group", GROUPS)
def test_cases(group: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(CASES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*command, "-k", group], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
