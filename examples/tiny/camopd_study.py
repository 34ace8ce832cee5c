"""CaMOPD on the tiny world: a model that learned a dialect and forgot the language gets the language back.

The general model is the bundled ``teacher_compile``: it writes ``C(7+1)*0`` as the stack program ``71+0*``. Some
seconds of fine-tuning on the dialect, where ``D(7+1)*0`` becomes ``*+710``, operators first, make it the domain model,
which now writes operators first for everything: that is the student, and a frozen copy of it is the domain
teacher. The prompts of the two differ by one letter and want opposite answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdengine.metrics import write_jsonl
from tiny import task
from tiny.study import HERE, MODELS, Arm, Study, specialise

GENERAL, DOMAIN = "compile", "dialect"
TRAIN_PROMPTS, TEST_PROMPTS = 1500, 150
REMEMBERED = 0.02
"""Share of the language in the fine-tuning data: without any, the student never once writes a right answer of it."""


def dialect(prompt: str, answer: str) -> tuple[str, str]:
    """A problem of ``compile`` in the dialect: marked D, answered with operators first."""
    stack: list[str] = []
    for symbol in answer:
        if symbol in task.OPERATORS:
            right, left = stack.pop(), stack.pop()
            stack.append(symbol + left + right)
        else:
            stack.append(symbol)
    return "D" + prompt[1:], stack[0]


def problem(rng: random.Random) -> tuple[str, str, str]:
    """One problem to fine-tune on: the dialect, and a little of the language."""
    prompt, answer = task.problem(GENERAL, "train", rng)
    return (*(dialect(prompt, answer) if rng.random() >= REMEMBERED else (prompt, answer)), GENERAL)


def rows(split: str, skill: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Like :func:`tiny.task.prompts`, with the dialect as a skill."""
    plain = task.prompts(split, GENERAL, n, seed)
    if skill == GENERAL:
        return plain
    pairs = [dialect(row["prompt"], row["answer"]) for row in plain]
    return [{"id": f"{split}/{p}", "prompt": p, "answer": a, "data_source": DOMAIN} for p, a in pairs]


MIXED = {"schedule": "mixed"}
VANILLA = {**MIXED, "n_general": 1, "selection": "none"}
ARMS = (
    Arm("camopd", "CaMOPD", {}, demo=True),
    Arm("vanilla", "mixed 1:1, no selection, r_g 1", {"camopd": {**VANILLA, "r_g": 1.0}}, demo=True),
    Arm("mixed_1_1", "mixed 1:1", {"camopd": {**MIXED, "n_general": 1}}),
    Arm("mixed_3_1", "mixed 3:1", {"camopd": MIXED}),
    Arm("no_selection", "without selection", {"camopd": {"selection": "none"}}, demo=True),
    Arm("random_selection", "random selection of the same size", {"camopd": {"selection": "random"}}),
    Arm("r_g_1", "r_g 1", {"camopd": {"r_g": 1.0}}),
    Arm("r_g_1_no_selection", "r_g 1, without selection", {"camopd": {"r_g": 1.0, "selection": "none"}}),
)  # fmt: skip


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """The specialised model, one order of prompts per seed, the held-out prompts."""
    special = specialise("teacher_compile", problem, 90, 1e-3, folder / "specialised")
    for seed in seeds:
        for skill in (GENERAL, DOMAIN):
            train = rows("train", skill, TRAIN_PROMPTS, seed)
            unanswered = [{k: v for k, v in row.items() if k != "answer"} for row in train]
            write_jsonl(folder / f"{skill}_{seed}.jsonl", unanswered)
    held_out = [row for skill in (GENERAL, DOMAIN) for row in rows(split, skill, TEST_PROMPTS)]
    write_jsonl(folder / "held_out.jsonl", held_out)
    return {"general teacher": str(MODELS / "teacher_compile"), "domain teacher = student before": special}


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """What all arms share."""
    special = str(folder / "specialised")
    return {
        "model": special,
        "teachers": [
            {"name": "general", "model": str(MODELS / "teacher_compile"), "dtype": "float32"},
            {"name": "domain", "model": special, "key": [DOMAIN], "dtype": "float32"},
        ],
        "method": "camopd",
        "camopd": {"domain": [DOMAIN], "diagnose_steps": 12, "diagnose_samples": 16},
        "train_data": [str(folder / f"{skill}_{seed}.jsonl") for skill in (GENERAL, DOMAIN)],
        "eval_data": [str(folder / "held_out.jsonl")],
        "verifier": {GENERAL: f"{HERE / 'task.py'}:verify", DOMAIN: "exact_match"},
        "verifier_workers": 1,
        "dtype": "float32",
        "loss_normalization": "sequence",
        "max_completion_length": 8,
        "per_device_train_batch_size": 32,
        "max_steps": 24,
        "learning_rate": 1.5e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.0,
        "max_grad_norm": 1000.0,  # where the norm is clipped in every step, r_g has no effect at all
        "eval_steps": 4,
        "log_completions": False,
    }


REPORTED = (
    "branches/cosine",
    *(
        f"{group}/{branch}/{name}"
        for branch in ("general", "domain")
        for group, name in (
            ("coherence", "gain"),
            ("coherence", "gain_random"),
            ("coherence", "gain_over_random"),
            ("camopd", "selected_share"),
        )
    ),
)

STUDY = Study("camopd", ARMS, {GENERAL: "general skill", DOMAIN: "domain"}, prepare, settings, REPORTED)
