"""Uni-OPD on the market, with a teacher that ranks wrong answers above right ones in a share of the questions.

python examples/real/uni_study.py --ablate --seeds 3 --jobs 2 --save_results benchmarks/results/real/uni_opd.json

Hours on two cores. The expert of totals is the only teacher: in questions of ``total`` it prefers right answers, in
questions of ``both`` it prefers those with last year's prices, which the verifier counts as wrong. The share of
``both`` among the training questions is swept; the engine reports how often the teacher ranked against the outcomes
(``order/violated``).
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
from tiny.study import Arm, Study
from tiny.study import main as run_study
from tiny.uni_study import REPORTED

SHARES = (25, 50, 75)
"""Percent of the training questions in which the teacher is wrong."""
QUESTIONS = 56
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


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """The questions of every share beside those of the other study."""
    for share in SHARES:
        write_jsonl(folder / f"wrong_{share}.jsonl", questions(share))
    return debate_study.prepare(folder, seeds, split)


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """Those of the demo, with four rollouts of each of four questions a step."""
    shared = debate_study.settings(folder, seed)
    del shared["debate"]
    return {
        **shared,
        "method": "uni_opd",
        "teachers": [debate_study.TOTALS],
        "per_device_train_batch_size": 4,
        "num_generations": 4,
    }


STUDY = Study("real_uni_opd", arms(), SKILLS, prepare, settings, REPORTED)

if __name__ == "__main__":
    os.chdir(ROOT)
    fetch()
    sys.exit(run_study(STUDY, __doc__ or "", sys.argv[1:]))
