"""Uni-OPD on the tiny world: two imperfect teachers, each for its own skill, and a verifier.

A model that solves both skills is damaged by noise on its weights: much for the student, less for each
teacher. So the right answer is not always what the teacher prefers, which is where outcomes can help. The
data are balanced by difficulty before training, by ``opdengine balance``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdengine.metrics import write_jsonl
from tiny import task
from tiny.study import HERE, Arm, Study, damage, specialise

SKILLS = ("convert", "compile")
EXPERT_STEPS = 150
NOISE = {"student_start": (0.4, 2), "teacher_convert": (0.2, 1), "teacher_compile": (0.3, 0)}
"""Amount and seed of the noise: a weak student, imperfect teachers."""
TRAIN_PROMPTS, TEST_PROMPTS = 250, 150

RAW = {"train_data": ["{folder}/raw_{seed}.jsonl"]}
NO_MARGIN = {"uni_opd": {"margin": "none"}}
ARMS = (
    Arm("uni_opd", "Uni-OPD", {}, demo=True),
    Arm("opd", "OPD", {**RAW, "uni_opd": {"margin": "none", "balance": "none"}}, demo=True),
    Arm("fixed", "OPD + fixed ±0.2", {**RAW, "uni_opd": {"margin": "fixed", "balance": "none"}}, demo=True),
    Arm("shift", "OPD + margin shift", {**RAW, "uni_opd": {"balance": "none"}}),
    Arm("mask", "OPD + greedy margin mask", {**RAW, "uni_opd": {"margin": "mask", "balance": "none"}}),
    Arm("no_margin", "without margin calibration", NO_MARGIN),
    Arm("no_online", "without online balancing", {"uni_opd": {"balance": "none"}}),
    Arm("no_offline", "without offline balancing", RAW),
    Arm("full_vocab", "exact reverse KL", {"advantage": {"kl_mode": "full_vocab"}}),
)


def problem(rng: random.Random) -> tuple[str, str, str]:
    """One problem of either skill."""
    skill = rng.choice(SKILLS)
    return (*task.problem(skill, "train", rng), skill)


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """The teachers; raw and balanced prompts for every seed; the held-out prompts."""
    from opdengine.config.loading import from_mapping
    from opdengine.config.train import TrainConfig
    from opdengine.tools.balance import BalanceSettings, balance

    expert = specialise("student", problem, EXPERT_STEPS, 2e-3, folder / "expert", corrupt=0.3)
    made = {name: damage(expert, amount, seed, folder / name) for name, (amount, seed) in NOISE.items()}
    graded = {"student before": made["student_start"]}
    graded |= {f"teacher of {skill}": made[f"teacher_{skill}"] for skill in SKILLS}
    write_jsonl(
        folder / "held_out.jsonl", [row for skill in SKILLS for row in task.prompts(split, skill, TEST_PROMPTS)]
    )
    for seed in seeds:
        raw = folder / f"raw_{seed}.jsonl"
        write_jsonl(raw, [r for skill in SKILLS for r in task.prompts("train", skill, TRAIN_PROMPTS, seed)])
        config = {**settings(folder, seed), "train_data": [str(raw)], "output_dir": str(folder), "seed": seed}
        chosen = BalanceSettings(folder / f"balanced_{seed}.jsonl", top_p=1.0, top_k=0, chunk=TRAIN_PROMPTS)
        balance(from_mapping(TrainConfig, config), chosen)
    return graded


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """What all arms share; 8 rollouts of each of 8 prompts a step."""
    return {
        "model": str(folder / "student_start"),
        "teachers": [
            {"name": skill, "model": str(folder / f"teacher_{skill}"), "key": [skill], "dtype": "float32"}
            for skill in SKILLS
        ],
        "method": "uni_opd",
        "train_data": [str(folder / f"balanced_{seed}.jsonl")],
        "eval_data": [str(folder / "held_out.jsonl")],
        "verifier": f"{HERE / 'task.py'}:verify",
        "verifier_workers": 1,
        "dtype": "float32",
        "loss_normalization": "sequence",
        "max_completion_length": 10,
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 30,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_ratio": 0.05,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "eval_steps": 10,
        "log_completions": False,
    }


REPORTED = (
    "balance/correct_before",
    "balance/correct_after",
    "completions/kept",
    "margin/shift",
    "order/violated",
    "order/consistent",
    "order/all_correct",
    "order/all_wrong",
    "order/inverted_pairs",
    "order/return_correct",
    "order/return_incorrect",
    "reward/mean",
)

STUDY = Study("uni_opd", ARMS, {skill: skill for skill in SKILLS}, prepare, settings, REPORTED)
