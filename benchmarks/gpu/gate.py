"""Does the fused loss run on this device, and is it right? A minute, before anything else is measured.

    python benchmarks/gpu/gate.py KIND TEACHERS [--smoke]        one of them, as JSON

Every divergence with one and two teachers against float64, each in a process of its own, so that one that fails ends
no other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "kernels"), str(HERE.parent)]

from problems import KINDS, S1, S2, Shape

SECONDS = 90


def command(kind: str, teachers: int, smoke: bool) -> list[str]:
    return [sys.executable, str(HERE / "gate.py"), kind, str(teachers), *["--smoke"] * smoke]


def check(kind: str, teachers: int, smoke: bool, seconds: float) -> dict[str, Any]:
    """Errors of one divergence, or how its process ended."""
    start = time.time()
    try:
        run = subprocess.run(command(kind, teachers, smoke), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s", "passed": False}
    if run.returncode:
        return {"error": (run.stdout + run.stderr)[-1500:], "passed": False}
    return {**json.loads(run.stdout.splitlines()[-1]), "seconds": round(time.time() - start, 2)}


def run_all(smoke: bool, deadline: float) -> dict[str, dict[str, Any]]:
    """All of them side by side: most of the time is Triton's compiler."""
    cases = [(kind, teachers) for teachers in (1, 2) for kind in KINDS]
    seconds = max(1.0, min(SECONDS, deadline - time.time()))
    with ThreadPoolExecutor(1 if smoke else len(cases)) as pool:
        found = pool.map(lambda case: check(*case, smoke, seconds), cases)
    return {f"{kind}, K={teachers}": figures for (kind, teachers), figures in zip(cases, found, strict=True)}


def main(kind: str, teachers: int, smoke: bool) -> None:
    import correctness
    import torch
    from problems import neighbours

    one = {1: S1, 2: S2}[teachers]
    shape = one.smaller() if smoke else Shape(one.name, 512, one.vocab, one.width, one.teachers)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    problem = neighbours(shape, device, dtype, 0.2, seed=1)
    print(json.dumps(correctness.compare(problem, kind, ["ours"])))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "--smoke" in sys.argv)
