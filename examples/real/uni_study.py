"""Uni-OPD on the market, with a teacher that ranks wrong answers above right ones in a share of the questions.

python examples/real/uni_study.py --ablate --seeds 3 --jobs 2 --save_results benchmarks/results/real/uni_opd.json

An hour of two cores. The expert of totals is the only teacher: in questions of ``total`` it prefers right answers, in
questions of ``both`` it prefers those with last year's prices, which the verifier counts as wrong. The student is that
expert after a short supervised training on replies of which half are wrong, so that it samples right and wrong answers
to the same question: a model that is never right gives outcomes nothing to say. The share of ``both`` among the
training questions is swept; the engine reports how often the teacher ranked against the outcomes (``order/violated``).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opdengine.metrics import write_jsonl
from real import market
from real import study as debate_study
from real.demo import ROOT, SKILLS, fetch
from real.lessons import Lesson
from tiny.study import Arm, Study
from tiny.study import main as run_study
from tiny.uni_study import REPORTED

SHARES = (25, 50, 75)
"""Percent of the training questions in which the teacher is wrong."""
QUESTIONS = 56
TEACHER = debate_study.TOTALS["model"]
STEPS = 32
"""Of the supervised training that makes the student."""
OPD = {"uni_opd": {"margin": "none", "balance": "none"}}


def arms() -> list[Arm]:
    """Uni-OPD and its baseline at every share."""
    found = []
    for share in SHARES:
        data = {"train_data": [f"{{folder}}/wrong_{share}.jsonl"]}
        found += [
            Arm(f"uni_opd_{share}", f"Uni-OPD, {share} % wrong", data, demo=True),
            Arm(f"opd_{share}", f"OPD, {share} % wrong", {**data, **OPD}, demo=True),
        ]
    return found


def questions(share: int) -> list[dict[str, Any]]:
    """Training questions with answers, ``share`` percent of them of the skill that the teacher gets wrong."""
    rows = []
    for skill, count in (("both", QUESTIONS * share // 100), ("total", QUESTIONS - QUESTIONS * share // 100)):
        found = market.questions("train", skill)
        random.Random(f"uni/{skill}").shuffle(found)
        rows += [{**found[i % len(found)], "id": f"{found[i % len(found)]['id']}/{i}"} for i in range(count)]
    return rows


def lesson(rng: random.Random) -> Lesson:
    """A training question with a reply that is right or wrong: today's price or last year's, a product or a sum."""
    skill = rng.choice(("both", "total"))
    while True:
        good, count, price = rng.choice(market.GOODS), rng.choice(market.COUNTS), rng.choice(market.PRICES)
        if market.split_of(skill, good, count, price) == "train":
            break
    right = rng.random() < 0.5
    if skill == "both":
        price = (market.TODAY if right else market.LAST_YEAR)[good]
    total = price * count if right or skill == "both" else price + count
    return Lesson(
        market.chat(market.question(skill, good, count, price)), market.reply(skill, good, count, price, total)
    )


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """The student, the questions of every share, and the held-out questions."""
    from real.build import teach_more

    for share in SHARES:
        write_jsonl(folder / f"wrong_{share}.jsonl", questions(share))
    debate_study.prepare(folder, seeds, split)
    student = teach_more(TEACHER, folder / "student", lesson, STEPS, "half right")
    return {"student before": student, "teacher": TEACHER}


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """Those of the demo in bfloat16, with eight rollouts of each of four questions a step."""
    shared = debate_study.settings(folder, seed)
    del shared["debate"], shared["divergence"]
    return {
        **shared,
        "method": "uni_opd",
        "model": str(folder / "student"),
        "dtype": "bfloat16",
        "teachers": [{"model": TEACHER, "dtype": "bfloat16"}],
        "per_device_train_batch_size": 4,
        "num_generations": 8,
        "max_steps": 24,
        "learning_rate": 1.5e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "eval_steps": 24,
    }


STUDY = Study("real_uni_opd", arms(), SKILLS, prepare, settings, REPORTED)

if __name__ == "__main__":
    os.chdir(ROOT)
    fetch()
    sys.exit(run_study(STUDY, __doc__ or "", sys.argv[1:]))
