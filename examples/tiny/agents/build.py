"""Make the tiny agents: ``python examples/tiny/agents/build.py --out DIR``.

Trains the teacher (acts and judges), two experts that debate, and the student on a short warm start; then
measures them on games of rooms that no training game has. Deterministic for a seed, a machine and a version
of torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from transformers import AutoModelForCausalLM

from tiny.agents import measure, world
from tiny.agents.house import House
from tiny.agents.lessons import Pupil
from tiny.agents.tokenizer import build_tokenizer
from tiny.lessons import Lesson
from tiny.training import new_model, supervise

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Plan:
    """How one model is made.

    Args:
        hidden, layers: its size.
        steps: of supervised learning.
        learning_rate: the highest.
        lessons: kind of lesson -> (how many in a batch, from which share of the steps on).
        games: how many different games it sees.
        noise: shares of wrong actions in the episodes it sees.
        expert: its place in debates.
        foreign: the type of task that it knows nothing about.
        haste: how often it is shown bad habits.
        seed: added to the seed of all.
        start: the model that it continues; "" begins with random weights.
    """

    hidden: int
    layers: int
    steps: int
    learning_rate: float
    lessons: Mapping[str, tuple[int, float]]
    games: int = 4000
    noise: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6)
    expert: int | None = None
    foreign: str = ""
    haste: float = 0.0
    seed: int = 0
    start: str = ""


ACT = {"episodes": (10, 0.0)}
DEBATER = {**ACT, "debates": (16, 0.0)}
BEGINNER = "beginner"
"""What all three teachers continue; it is not kept."""
PLANS = {
    BEGINNER: Plan(64, 3, 1800, 3e-3, {**ACT, "judgements": (20, 0.6)}),
    "teacher": Plan(64, 3, 450, 2e-3, {**ACT, "judgements": (28, 0.0)}, seed=4, start=BEGINNER),
    "expert_bring": Plan(64, 3, 400, 1.5e-3, DEBATER, expert=0, foreign="open", seed=1, start=BEGINNER),
    "expert_open": Plan(64, 3, 400, 1.5e-3, DEBATER, expert=1, foreign="bring", seed=2, start=BEGINNER),
    "student": Plan(64, 3, 120, 1e-3, ACT, noise=(0.0, 0.1), seed=3, start=BEGINNER, haste=0.9),
}


def main() -> None:
    """Train the models of the agents' demos, and measure them in ``report.json``."""
    kept = [name for name in PLANS if name != BEGINNER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODELS, help="where the model folders go")
    parser.add_argument("--only", nargs="+", choices=kept, default=kept, help="make these again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--student_steps", type=int, default=PLANS["student"].steps, help="length of its warm start")
    parser.add_argument("--games", type=int, default=200, help="games of each split in report.json")
    parser.add_argument("--report_only", action="store_true", help="measure the models in --out again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    file = args.out / "report.json"
    made: dict[str, Any] = json.loads(file.read_text())["made"] if file.is_file() else {}
    if not args.report_only:
        made |= make_all(args.only, args.out, args.seed, args.student_steps)
    file.write_text(json.dumps({"made": made, **report(args.out, args.games)}, indent=1) + "\n")


def make_all(names: Sequence[str], out: Path, seed: int, student_steps: int) -> dict[str, Any]:
    """Train some models, two at a time; returns what the report says about the making of each."""
    plans = {**PLANS, "student": replace(PLANS["student"], steps=student_steps)}
    first = [BEGINNER] * any(plans[name].start for name in names) + [n for n in names if not plans[n].start]
    made: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        for stage in (first, [name for name in names if plans[name].start]):
            jobs = {
                name: pool.submit(make, name, plans[name], Path(scratch) if name == BEGINNER else out, seed, scratch)
                for name in stage
            }
            made |= {name: job.result() for name, job in jobs.items()}
    return made


def make(name: str, plan: Plan, out: Path, seed: int, scratch: str) -> dict[str, float]:
    """Train one model and save its folder in ``out``; returns its seed, steps and seconds of processor time.

    Args:
        name: of the model.
        plan: how it is made.
        out: where its folder goes.
        seed: of all.
        scratch: where the folder of ``plan.start`` is.
    """
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started, seed = time.process_time(), seed + plan.seed
    tokenizer = build_tokenizer()
    games = House.tasks("train", **world.OPTIONS, count=plan.games)
    pupil = Pupil(tokenizer, games, random.Random(seed), plan.noise, plan.expert, plan.foreign, plan.haste)
    model = new_model(tokenizer, plan.hidden, plan.layers, seed)
    if plan.start:
        model = AutoModelForCausalLM.from_pretrained(Path(scratch) / plan.start, dtype=torch.float32)
    done = 0

    def lessons(step: int) -> list[Lesson]:
        return [
            lesson
            for kind, (count, start) in plan.lessons.items()
            if step >= start * plan.steps
            for lesson in getattr(pupil, kind)(count)
        ]

    def progress(text: str) -> None:
        nonlocal done
        done += 1
        if done % 100 == 0 or done == plan.steps:
            print(f"{name}: step {done} of {plan.steps}, {text}", flush=True)

    supervise(model, lessons, plan.steps, plan.learning_rate, progress)
    model.half().save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    return {"seed": seed, "steps": plan.steps, "cpu_seconds": round(time.process_time() - started, 1)}


def report(out: Path, count: int) -> dict[str, Any]:
    """Measure the models as they lie on disk: games won, the judge, the experts after a debate."""
    tokenizer = build_tokenizer()
    names = [name for name in PLANS if (out / name).is_dir()]
    models = {name: AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval() for name in names}
    found: dict[str, Any] = {
        "games_per_split": count,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for split in ("valid_seen", "valid_unseen"):
        games = House.tasks(split, **world.OPTIONS, count=count)
        found[split] = {
            name: {
                "greedy": measure.success(model, tokenizer, games),
                "sampled": measure.success(model, tokenizer, games, 1.0),
            }
            for name, model in models.items()
        }
        if "teacher" in models:
            found[split]["judge"] = measure.judge(models["teacher"], tokenizer, games, 2 * count)
        if {"expert_bring", "expert_open"} <= set(models):
            experts = [models["expert_bring"], models["expert_open"]]
            found[split]["debate"] = measure.debate(experts, tokenizer, games, count)
    return found


if __name__ == "__main__":
    main()
