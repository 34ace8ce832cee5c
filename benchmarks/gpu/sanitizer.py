"""Every sweep of the row kernels under NVIDIA's ``compute-sanitizer``, each tool in a process of its own.

    python benchmarks/gpu/sanitizer.py        the sweeps alone, which is what the tools watch

memcheck finds accesses outside an allocation (PyTorch's caching is off, so that these are exact),
racecheck hazards in shared memory, initcheck reads of memory that nothing wrote, synccheck wrong
barriers. Where the tool is not installed that is the result.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ROWS, VOCAB = 5, 4099
"""A vocabulary that neither a block nor 16 divides."""
SECONDS = 60
ERRORS = 9
"""Exit status that stands for findings."""

Case = tuple[str, Callable[[], dict[str, Any]]]


def find() -> str | None:
    """The tool on the path or in a CUDA toolkit."""
    places = [shutil.which("compute-sanitizer"), *sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    return next((str(place) for place in places if place), None)


def check(tool: str, command: list[str]) -> dict[str, Any]:
    """Run ``command`` under a tool: its summary lines, and whether it found nothing."""
    program = find()
    if program is None:
        return {"found": "not installed"}
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [program, "--tool", tool, "--error-exitcode", str(ERRORS), *command]
    try:
        run = subprocess.run(watched, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"found": f"not done after {SECONDS} s"}
    text = run.stdout + run.stderr
    summary = re.findall(r"=========.*(?:ERROR SUMMARY|RACECHECK SUMMARY|not supported|Error:).*", text)
    finished = "every sweep ran" in text
    out: dict[str, Any] = {"found": " ".join(summary) or f"exit {run.returncode}", "finished": finished}
    if finished:
        out["passed"] = run.returncode == 0
    if run.returncode or not finished:
        out["tail"] = text[-1500:]
    return out


def cases(smoke: bool) -> Iterator[Case]:
    del smoke  # without the tool every case is short
    for tool in TOOLS:
        yield tool, lambda tool=tool: check(tool, [sys.executable, str(Path(__file__))])


def main() -> None:
    sys.path[:0] = [str(HERE.parents[1] / "kernels"), str(HERE.parent)]
    import torch
    from gpu_rows import sweeps

    for _, _, call in sweeps(ROWS, VOCAB):
        call()
    torch.cuda.synchronize()
    print("every sweep ran")


if __name__ == "__main__":
    main()
