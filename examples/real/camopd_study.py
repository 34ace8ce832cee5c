"""CaMOPD on the market: a model that learned to add and forgot to multiply gets its products back.

python examples/real/camopd_study.py --seeds 3 --jobs 1
python examples/real/camopd_study.py --ablate --seeds 3 --jobs 1 --save_results benchmarks/results/real/camopd.json

The second call also has 3:1 in one batch, r_g 1 and no domain branch.

The general model is the expert of totals. A short supervised training on ``One lamp costs 4 coins, so 3 cost 7
coins.``, today's price plus the number of pieces, makes it the domain model: it knows the prices and often adds where
it should multiply. That is the student, and a frozen copy of it is the domain teacher. The two kinds of questions are
answered in the same words and want different arithmetic. Half an hour of one core that is idle; with
``--ablate`` an hour.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opdengine.metrics import write_jsonl
from real import market
from real import study as debate_study
from real.demo import ROOT, fetch
from real.lessons import Lesson
from tiny.camopd_study import ARMS as TINY_ARMS
from tiny.camopd_study import REPORTED
from tiny.study import Arm, Study
from tiny.study import main as run_study

GENERAL, DOMAIN = "total", "sum"
SKILLS = {GENERAL: "what do 3 things at 7 coins cost: 21", DOMAIN: "what do 3 lamps cost: price + 3"}
STEPS = 48
"""Of the supervised training that makes the domain model."""
REMEMBERED = 0.05
"""Share of products in the lessons: after a trial without any, no sampled answer was right and could be preferred."""
ARMS = (
    # What it costs to compare gradients is left to the method's own runs.
    Arm("camopd", "CaMOPD", {"camopd": {"diagnose_steps": 6, "diagnose_samples": 12}}, demo=True),
    *(replace(arm, demo=True) for arm in TINY_ARMS if arm.name in ("vanilla", "no_selection", "random_selection")),
    *(arm for arm in TINY_ARMS if arm.name in ("mixed_3_1", "r_g_1")),
    Arm("general_only", "general branch alone", {"camopd": {"n_general": 1000}}),
)


def rows(split: str, skill: str) -> list[dict[str, Any]]:
    """Like :func:`real.market.questions`, with sums as a skill: ``both``, answered by today's price plus the number."""
    if skill == GENERAL:
        return market.questions(split, skill)
    cases = {market.question("both", g, n, 0): market.TODAY[g] + n for g in market.GOODS for n in market.COUNTS}
    return [
        {**row, "answer": str(cases[row["messages"][-1]["content"]]), "data_source": DOMAIN}  # type: ignore[index]
        for row in market.questions(split, "both")
    ]


def lesson(rng: random.Random) -> Lesson:
    """A training question with its whole answer: a sum, and now and then a product."""
    skill = GENERAL if rng.random() < REMEMBERED else "both"
    while True:
        good, count, price = rng.choice(market.GOODS), rng.choice(market.COUNTS), rng.choice(market.PRICES)
        if market.split_of(skill, good, count, price) == "train":
            break
    today = price if skill == GENERAL else market.TODAY[good]
    total = today * count if skill == GENERAL else today + count
    chat = market.chat(market.question(skill, good, count, price))
    return Lesson(chat, market.reply(skill, good, count, today, total))


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """The specialised model, the questions of both kinds, and the two teachers to grade."""
    if split != "test":
        raise SystemExit("the market has training questions and test questions only: leave --split out")
    from real.build import teach_more

    special = teach_more(debate_study.TOTALS["model"], folder / "specialised", lesson, STEPS, "specialise")
    for skill in (GENERAL, DOMAIN):
        train = [{k: v for k, v in row.items() if k != "answer"} for row in rows("train", skill)]
        write_jsonl(folder / f"{skill}.jsonl", train)
    write_jsonl(folder / "held_out.jsonl", [row for skill in (GENERAL, DOMAIN) for row in rows(split, skill)])
    return {"general teacher": debate_study.TOTALS["model"], "domain teacher = student before": special}


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """Model, adapter and sampling of the demo; two teachers, and the step of the study on the tiny world."""
    shared, special = debate_study.settings(folder, seed), str(folder / "specialised")
    del shared["debate"], shared["divergence"]
    return {
        **shared,
        "model": special,
        "teachers": [
            {**debate_study.TOTALS, "name": "general"},
            {"name": "domain", "model": special, "key": [DOMAIN], "dtype": "float32"},
        ],
        "method": "camopd",
        "camopd": {"domain": [DOMAIN]},
        "train_data": [str(folder / f"{skill}.jsonl") for skill in (GENERAL, DOMAIN)],
        "eval_data": [str(folder / "held_out.jsonl")],
        "per_device_train_batch_size": 12,
        "max_steps": 12,
        "learning_rate": 4e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "max_grad_norm": 1000.0,  # where the norm is clipped in every step, r_g has no effect at all
        "eval_steps": 12,
    }


GAPS = ("camopd/general/gap_abs", "camopd/domain/gap_abs", "grad_norm")
STUDY = Study("real_camopd", ARMS, SKILLS, prepare, settings, (*REPORTED, *GAPS))

if __name__ == "__main__":
    os.chdir(ROOT)
    fetch()
    sys.exit(run_study(STUDY, __doc__ or "", sys.argv[1:]))
