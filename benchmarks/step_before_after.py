"""Seconds of whole steps of two checkouts of this repository, measured in one run, in turns.

python benchmarks/step_before_after.py --before FOLDER --after FOLDER [--rounds 9] [--clock cpu] [--save FILE]

Each checkout trains the bundled tiny models by its own command line, each round in a process of its own. What is
compared is ``timing/step`` of the steps after the first ones, from the run's own log: wall seconds from one step's
end to the next one's, everything included; with ``--clock cpu`` processor seconds of the process, which other
programs on the machine do not stretch. A round runs both checkouts one after the other, the first one first in
every second round; its ratio is that of their medians, and the verdict is the median of the rounds' ratios, so that a
machine that slows down for a while slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from tiny import task
from tiny.demo import _debate

WARM_UP = 3
ALLOWED = 1.03
CLOCKS = {"wall": "", "cpu": "time.perf_counter = time.process_time; "}
WORKER = "import sys, time; {clock}from opdengine.cli import main; sys.exit(main(sys.argv[1:]))"


def settings(method: str, data: Path, output: Path, models: Path, steps: int) -> dict[str, Any]:
    """A run that spends its time in steps: no evaluation, no checkpoint."""
    return {
        "model": str(models / "student"),
        "dtype": "float32",
        "teachers": [
            {"model": str(models / f"teacher_{skill}"), "dtype": "float32"} for skill in ("convert", "compile")
        ],
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


def step_seconds(checkout: Path, config: Path, output: Path, clock: str) -> list[float]:
    """``timing/step`` of a run of one checkout, after the warm-up."""
    places = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(clock=CLOCKS[clock]), "train", "--config", str(config)],
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=output.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{checkout} does not train:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["timing/step"] for row in rows if row["step"] > WARM_UP]


def compare(method: str, checkouts: dict[str, Path], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of both checkouts, and the ratio after/before of every round."""
    rounds, steps = options.rounds, options.steps
    data = folder / "train.jsonl"
    rows = [row for skill in task.SKILLS for row in task.prompts("train", skill, 16 * steps, seed=5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    for number in range(rounds):
        for name in sorted(checkouts, reverse=number % 2 == 1):
            output = folder / f"{method}_{name}_{number}"
            config = folder / "run.yaml"
            config.write_text(json.dumps(settings(method, data, output, ROOT / "examples/tiny/models", steps)))
            taken = statistics.median(step_seconds(checkouts[name], config, output, options.clock))
            seconds[name].append(taken)
            print(f"{method} round {number}, {name}: {1e3 * taken:.1f} ms a step", flush=True)
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    return {
        "step_s": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "steps": steps - WARM_UP,
    }


def main() -> int:
    """Compare, print a line for each method, and fail where a step has become more than 3 % slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, required=True, help="another one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--methods", nargs="+", default=["mt_opd", "mad_opd"])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--save", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            found[method] = compare(method, checkouts, options, Path(folder))
    for method, figures in found.items():
        verdict = "ok" if figures["ratio"] <= ALLOWED else f"more than {ALLOWED - 1:.0%} slower"
        print(f"{method}: after/before {figures['ratio']:.3f} (rounds {min(figures['ratios'])} to "
              f"{max(figures['ratios'])}): {verdict}")  # fmt: skip
    if options.save:
        options.save.write_text(json.dumps({"clock": options.clock, "results": found}, indent=1) + "\n")
    return int(any(figures["ratio"] > ALLOWED for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
