"""Uni-OPD on the tiny world: two imperfect teachers, each for its own skill, and a verifier.

The teachers are the bundled student, fine-tuned for seconds on one skill each until they solve about six of
ten problems. So the right answer is not always what the teacher prefers, which is where outcomes can help. The data are
balanced by difficulty before training, with the command's own rules.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opdengine.metrics import write_jsonl
from tiny import task
from tiny.study import HERE, MODELS, Arm, Study, specialise

SKILLS = {"convert": (30, 2e-3), "compile": (20, 2e-3)}
"""Steps and learning rate that make an imperfect teacher of each skill."""
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


def problem(skill: str) -> Callable[[random.Random], tuple[str, str, str]]:
    """Source of problems of a skill."""
    return lambda rng: (*task.problem(skill, "train", rng), skill)


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """The teachers; raw and balanced prompts for every seed; the held-out prompts."""
    from opdengine.balance import BalanceSettings, balance
    from opdengine.config import TrainConfig
    from opdengine.settings import from_mapping

    graded = {"student before": str(MODELS / "student")}
    for skill, (steps, rate) in SKILLS.items():
        graded[f"teacher of {skill}"] = specialise("student", problem(skill), steps, rate, folder / f"teacher_{skill}")
    write_jsonl(
        folder / "held_out.jsonl", [row for skill in SKILLS for row in task.prompts(split, skill, TEST_PROMPTS)]
    )
    for seed in seeds:
        raw = folder / f"raw_{seed}.jsonl"
        write_jsonl(raw, [r for skill in SKILLS for r in task.prompts("train", skill, TRAIN_PROMPTS, seed)])
        config = {**settings(folder, seed), "train_data": [str(raw)], "output_dir": str(folder), "seed": seed}
        chosen = BalanceSettings(folder / f"balanced_{seed}.jsonl", chunk=TRAIN_PROMPTS)
        balance(from_mapping(TrainConfig, config), chosen)
    return graded


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """What all arms share; 8 rollouts of each of 8 prompts a step."""
    return {
        "model": str(MODELS / "student"),
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
        "max_steps": 40,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.0,
        "eval_steps": 5,
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
