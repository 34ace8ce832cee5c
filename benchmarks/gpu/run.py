"""The whole GPU session, unattended; one JSON and a table.

    python benchmarks/gpu/run.py [--out FILE] [--minutes 9] [--smoke]    gate, ceilings, speed, tests, peers, errors
    python benchmarks/gpu/run.py --more                                  a whole step, the engine, the rest

Needs torch, triton and pytest, and transformers for the whole step; TRL and Liger are measured where
they can be imported. Every section runs in a process of its own and within its share of the time;
each case is written to the file as soon as it is done, so nothing is lost when time runs out.
``--more`` and ``--section`` add to the file of an earlier run with the same versions. ``--smoke``
runs everything at tiny sizes on whatever device is there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(HERE.parent)]

import gate
from conftest import device_name, environment
from table import lines

SECTIONS = {"gate": 90, "ceilings": 60, "speed": 240, "tests": 160, "liger": 120, "correctness": 600}
MORE = {
    "step": 150,
    "engine": 100,
    "kernels": 90,
    "shapes": 60,
    "peers": 180,
    "screened": 40,
    "sanitizer": 600,
}
"""Seconds each may take; the last one has what is left."""
MODULES = {"liger": "speed", "shapes": "speed", "peers": "speed", "kernels": "ceilings"}
GRACE = 30


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<device>/loss.json")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--more", action="store_true", help=f"the second half: {', '.join(MORE)}")
    parser.add_argument("--section", nargs="+", choices=[*SECTIONS, *MORE], help="run these only, in this order")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out or HERE.parent / "results" / device_name() / "loss.json"
    if options.deadline:
        run_section(options.section[0], out, options.deadline, options.smoke)
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    begin(out, {**environment(), "driver": driver(), "smoke": options.smoke}, options.more or bool(options.section))
    end = time.time() + 60 * options.minutes - GRACE
    every = SECTIONS | MORE
    for name in options.section or (MORE if options.more else SECTIONS):
        start_section(name, out, min(end, time.time() + every[name]), options.smoke)
    print("\n".join(lines(json.loads(out.read_text()))))
    print(f"written to {out}")
    return int(failed(json.loads(out.read_text())["results"]))


def begin(out: Path, about: dict[str, Any], add: bool) -> None:
    """An empty file, or with ``add`` the one that is there if it was measured with the same software, with what else
    stands in it."""
    kept: dict[str, Any] = {"results": {}}
    if add and out.is_file():
        before = json.loads(out.read_text())
        if all(before.get(key) == about[key] for key in ("device", "versions", "driver", "smoke")):
            kept = before
    write(out, {**kept, **about})


def start_section(name: str, out: Path, deadline: float, smoke: bool) -> None:
    """Run a section in a child process that is ended soon after the deadline."""
    document = json.loads(out.read_text())
    document["results"].pop(name, None)
    write(out, document)
    if name == "tests":
        record(out, name, "gpu", test_run(deadline, smoke))
        return
    if name == "gate":
        pass_gate(out, deadline, smoke)
        return
    command = [sys.executable, str(Path(__file__)), "--section", name, "--out", str(out), "--deadline", str(deadline)]
    try:
        code = subprocess.run(
            command + ["--smoke"] * smoke, timeout=max(1.0, deadline + GRACE - time.time())
        ).returncode
    except subprocess.TimeoutExpired:
        code = "ended at its deadline"
    if code != 0:
        record(out, name, "exit", {"error": f"{name}: {code}"})


def pass_gate(out: Path, deadline: float, smoke: bool) -> None:
    """Whether the loss is right here; where nothing runs at all, there is no rest."""
    found = gate.run_all(smoke, deadline)
    for case, figures in found.items():
        record(out, "gate", case, figures)
        print(f"gate: {case}: {'passed' if figures['passed'] else figures}", flush=True)
    if all("error" in figures for figures in found.values()):
        sys.exit(f"the fused loss does not run on this device; {out} holds the errors")


def run_section(name: str, out: Path, deadline: float, smoke: bool) -> None:
    """Run the cases of a section one by one; those after the deadline are recorded as left out."""
    from measure import release

    for case, function in cases(name, out, smoke):
        if time.time() > deadline:
            record(out, name, case, {"skipped": "no time left"})
            continue
        start = time.time()
        try:
            figures = function()
        except Exception:
            figures = {"error": traceback.format_exc(limit=3)[-600:]}
        record(out, name, case, {**figures, "seconds": round(time.time() - start, 2)})
        print(f"{name}: {case} ({time.time() - start:.1f} s)", flush=True)
        release()


def cases(name: str, out: Path, smoke: bool) -> Iterator[tuple[str, Any]]:
    module = importlib.import_module(MODULES.get(name, name))
    if name == "correctness":
        return module.cases(smoke, seed=int(time.time()))
    if name == "kernels":
        return module.kernel_cases(smoke)
    if MODULES.get(name, name) != "speed":
        return module.cases(smoke)
    measured = json.loads(out.read_text())["results"].get("ceilings", {})
    squares = [figures.get("tflops") for case, figures in measured.items() if case.startswith("matmul")]
    ceiling = squares[0] if squares else None
    makers = {"speed": "cases", "liger": "liger_cases", "shapes": "shape_cases", "peers": "best_cases"}
    return getattr(module, makers[name])(smoke, ceiling)


def test_run(deadline: float, smoke: bool) -> dict[str, Any]:
    """The GPU tests; the counts that pytest reports."""
    if smoke:
        return {"skipped": "smoke"}
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    options = ["-m", "gpu", "-vv", "-p", "no:cacheprovider", "--durations=8"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", *options]
    if importlib.util.find_spec("xdist"):
        # Most of their time is Triton's compiler, and each needs a few GB of the device.
        command += ["-n", str(max(1, min(10, (os.cpu_count() or 1) - 2)))]
    env = {**os.environ, "PYTHONPATH": paths}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=max(1.0, deadline - time.time())
        )
        text, code = run.stdout, run.returncode
    except subprocess.TimeoutExpired as found:
        text, code = (found.stdout or b"").decode(errors="replace"), "ended at its deadline"
    outcomes = re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)|(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)", text)
    by_test = {one or other: word or last for word, one, other, last in outcomes}
    counts = Counter(word.lower() for word in by_test.values())
    failures = [name for name, word in by_test.items() if word in ("FAILED", "ERROR")]
    return {"exit": code, **counts, "failures": failures, "tail": text[-30000:] if code else text[-1500:]}


def record(out: Path, section: str, case: str, figures: dict[str, Any]) -> None:
    """Add one case to the file."""
    document = json.loads(out.read_text())
    document["results"].setdefault(section, {})[case] = figures
    write(out, document)


def write(out: Path, document: dict[str, Any]) -> None:
    """Replace the file as a whole: a reader never sees half of it."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(out)


def failed(results: dict[str, Any]) -> bool:
    """Whether a test, a bound on an error or a whole section failed."""
    if results.get("tests", {}).get("gpu", {}).get("exit", 0) != 0:
        return True
    checks = [c for name in ("gate", "correctness", "sanitizer", "engine") for c in results.get(name, {}).values()]
    return any("error" in c or not c.get("passed", True) for c in checks) or any("exit" in s for s in results.values())


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
