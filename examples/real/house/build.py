"""Teach the agents of the house: ``python examples/real/house/build.py --model models/smollm2 --out DIR``.

Each is a LoRA adapter of SmolLM2-135M-Instruct: a teacher that plays and judges, a student that has seen a few hasty
games, and two experts that debate, each of which knows one type of task not at all. They are taught in processes of
their own, in bfloat16. Deterministic for a seed, a machine and a version of torch.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from opdengine.models.backbone import load_model
from opdengine.models.chat import load_tokenizer
from real.build import BASE, LEARNING_RATE, fit, likelihood, save, with_adapter
from real.house.lessons import JUDGE_PROMPT, RealPupil
from tiny.agents import world
from tiny.agents.house import House

GAMES = 1000


@dataclass(frozen=True)
class Plan:
    """How one adapter is made.

    Args:
        steps: of supervised learning.
        lessons: kind of lesson -> how many in a step.
        noise: shares of wrong actions in the episodes.
        expert: its place in debates.
        foreign: the type of task that it knows nothing about.
        haste: how often it is shown bad habits.
        seed: added to the seed of all.
    """

    steps: int
    lessons: Mapping[str, int]
    noise: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6)
    expert: int | None = None
    foreign: str = ""
    haste: float = 0.0
    seed: int = 0


DEBATER = {"episodes": 4, "debates": 8}
PLANS = {
    "teacher": Plan(160, {"episodes": 6, "judgements": 8}),
    "student": Plan(40, {"episodes": 6}, noise=(0.0, 0.1), haste=0.9, seed=3),
    "expert_bring": Plan(100, DEBATER, expert=0, foreign="open", seed=1),
    "expert_open": Plan(100, DEBATER, expert=1, foreign="bring", seed=2),
}


def main() -> None:
    """Teach some of the agents, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE, help="folder of `opdengine fetch smollm2-135m`")
    parser.add_argument("--out", type=Path, required=True, help="where the adapters' folders go")
    parser.add_argument("--only", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if len(args.only) == 1:
        teach(args.model, args.out, args.only[0], args.seed)
        return
    running: list[subprocess.Popen[bytes]] = []
    for name in args.only:
        while sum(child.poll() is None for child in running) >= 2:
            time.sleep(1)
        running.append(subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--only", name]))
    if any([child.wait() for child in running]):
        raise SystemExit("an agent could not be made; its process says why above")


def teach(model: str, out: Path, name: str, seed: int) -> None:
    """Teach and save one agent.

    Args:
        model: folder of the base.
        out: where the adapter's folder goes.
        name: of a plan.
        seed: of games, lessons and initialisation.
    """
    plan, started = PLANS[name], time.process_time()
    torch.manual_seed(seed + plan.seed)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    tokenizer, base = load_tokenizer(model), load_model(model, dtype="bfloat16")
    adapted = with_adapter(base)
    pupil = RealPupil(
        tokenizer,
        House.tasks("train", **world.OPTIONS, count=GAMES),
        random.Random(f"{seed + plan.seed}/{name}"),
        plan.noise,
        plan.expert,
        plan.foreign,
        plan.haste,
        JUDGE_PROMPT,
        tokenizer.eos_token,
    )

    def study(step: int) -> None:
        told = []
        for kind, number in plan.lessons.items():
            lessons = getattr(pupil, kind)(number)
            loss = likelihood(base, [x.inputs for x in lessons], [x.labels for x in lessons])
            (loss / len(plan.lessons)).backward()
            told.append(f"{kind} {loss.item():.3f}")
        if (step + 1) % 5 == 0:
            print(f"{name}  step {step + 1}/{plan.steps}  {'  '.join(told)}", flush=True)

    fit(adapted, plan.steps, LEARNING_RATE, study)
    made = {"seed": seed, "steps": plan.steps, "training_cpu_seconds": round(time.process_time() - started)}
    save(adapted, out / name, made)


if __name__ == "__main__":
    main()
