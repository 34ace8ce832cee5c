"""Seconds of whole steps of two checkouts of this repository, measured in one run, step by step in turns.

python benchmarks/step_before_after.py --before FOLDER --after FOLDER [--steps 60] [--save FILE]

Both checkouts train the bundled tiny models by their own command lines at once, but only one of them runs at a time:
when it has written the line of a step to its log, it is stopped and the other one goes on. Two times are taken of each
step: wall seconds from going on to the line, and processor seconds from line to line, which other programs on the
machine hardly stretch. The ratio is the median over pairs of steps; the verdict is that of the processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from tiny import task
from tiny.demo import _debate

WARM_UP = 3
ALLOWED = 1.03
WORKER = """
import sys, time
time.perf_counter = time.process_time  # what timing/step is measured by
from opdengine.cli import main
sys.exit(main(sys.argv[1:]))
"""


def settings(method: str, data: Path, output: Path, steps: int) -> dict[str, Any]:
    """A run that spends its time in steps: no evaluation, no checkpoint."""
    models = ROOT / "examples" / "tiny" / "models"
    return {
        "model": str(models / "student"),
        "dtype": "float32",
        "teachers": [{"model": str(models / f"teacher_{s}"), "dtype": "float32"} for s in ("convert", "compile")],
        "method": method,
        "train_data": [str(data)],
        "output_dir": str(output),
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_completion_length": 14,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "save_steps": 0,
        "eval_steps": 0,
        "logging_steps": 1,
        "seed": 0,
        "debate": _debate(rounds=2),
    }


class Run:
    """One checkout that trains, and stands still unless it is its turn.

    Args:
        checkout: of the repository.
        name: of its files.
        method: that it trains by.
        folder: for its files, with the data.
        steps: that it may be asked for.
    """

    def __init__(self, checkout: Path, name: str, method: str, folder: Path, steps: int) -> None:
        output = folder / f"{method}_{name}"
        config, self.log, self.errors = (
            output.with_suffix(".json"),
            output / "metrics.jsonl",
            output.with_suffix(".log"),
        )
        config.write_text(json.dumps(settings(method, folder / "train.jsonl", output, steps)))
        places = os.pathsep.join([str(checkout), str(checkout / "kernels")])
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, "train", "--config", str(config)],
                env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                cwd=folder, stdout=errors, stderr=errors,
            )  # fmt: skip
        self.step(WARM_UP)

    def lines(self) -> list[str]:
        """The lines of its log."""
        return self.log.read_text().splitlines() if self.log.is_file() else []

    def step(self, number: int) -> float:
        """Go on until the log has the line of a step; the wall seconds that takes."""
        start = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        while len(self.lines()) < number:
            if self.process.poll() is not None:
                raise RuntimeError(f"the run has ended early:\n{self.errors.read_text()[-3000:]}")
            time.sleep(5e-4)
        seconds = time.perf_counter() - start
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def processor_seconds(self) -> list[float]:
        """Of every step after the warm-up."""
        return [json.loads(line)["timing/step"] for line in self.lines()[WARM_UP:]]

    def end(self) -> None:
        """End it where it stands."""
        self.process.kill()
        self.process.wait()


def compare(method: str, checkouts: dict[str, Path], steps: int) -> dict[str, dict[str, float]]:
    """By clock: the median seconds of both checkouts and the ratio after / before."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [row for skill in task.SKILLS for row in task.prompts("train", skill, 600, seed=5)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs: dict[str, Run] = {}
        wall: dict[str, list[float]] = {name: [] for name in checkouts}
        try:
            for name, checkout in checkouts.items():
                runs[name] = Run(checkout, name, method, folder, WARM_UP + steps + 1)
            for number in range(WARM_UP + 1, WARM_UP + steps + 1):
                for name in sorted(runs, reverse=number % 2 == 1):  # who is first changes
                    wall[name].append(runs[name].step(number))
            processor = {name: run.processor_seconds() for name, run in runs.items()}
        finally:
            for run in runs.values():
                run.end()
    found = {}
    for clock, seconds in (("wall", wall), ("processor", processor)):
        ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[clock] = {name: statistics.median(values) for name, values in seconds.items()}
        found[clock] |= {"ratio": middle, "quartile_1": low, "quartile_3": high}
    return found


def main() -> int:
    """Compare, print two lines for each method, and fail where a step has become more than 3 % slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, required=True, help="another one")
    parser.add_argument("--methods", nargs="+", default=["mt_opd", "mad_opd"])
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--save", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
    found = {method: compare(method, checkouts, options.steps) for method in options.methods}
    for method, clocks in found.items():
        for clock, f in clocks.items():
            print(f"{method}, {clock} time: {1e3 * f['before']:.1f} ms before, {1e3 * f['after']:.1f} ms after, ratio "
                  f"{f['ratio']:.3f} (quartiles {f['quartile_1']:.3f} and {f['quartile_3']:.3f})")  # fmt: skip
    slower = [method for method, clocks in found.items() if clocks["processor"]["ratio"] > ALLOWED]
    print(f"more than {ALLOWED - 1:.0%} slower: {', '.join(slower)}" if slower else "ok")
    if options.save:
        options.save.write_text(json.dumps({"steps": options.steps, "results": found}, indent=1) + "\n")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
