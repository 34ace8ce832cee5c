"""Uni-OPD on pictures of shapes: a student that mixes up half of its words learns from a teacher that sees, or from
one that reads captions in the pictures' place.

The settings are those of the paper's multimodal runs: offline balancing, online balancing of each prompt's rollouts,
margins by the mean statistic, lifted to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdengine.metrics import write_jsonl
from tiny.pictures import world
from tiny.study import Arm, Study

MODELS = Path(__file__).parent / "models"
TRAIN_PICTURES, TEST_PICTURES = 120, 150
"""Of each skill."""
DRAWN_BEFORE = 100
"""Pictures of seeds below this one made and measured the models, and settings were tried on them."""

PLAIN = {"train_data": ["{folder}/raw_{seed}.jsonl"], "uni_opd": {"margin": "none", "balance": "none"}}
READS = {"teachers": [{"name": "reads", "model": str(MODELS / "reader"), "images": "text", "dtype": "float32"}]}
ARMS = (
    Arm("uni_opd", "Uni-OPD", {}, demo=True),
    Arm("opd", "OPD", PLAIN, demo=True),
    Arm("cross_modal", "Uni-OPD, teacher reads captions", READS, demo=True),
    Arm("full_vocab", "exact reverse KL", {"advantage": {"kl_mode": "full_vocab"}}),
)


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """Raw and balanced prompts for every seed; the held-out prompts."""
    from opdengine.config.loading import from_mapping
    from opdengine.config.train import TrainConfig
    from opdengine.tools.balance import BalanceSettings, balance

    def rows(of: str, count: int, seed: int) -> list[dict[str, Any]]:
        return [row for skill in world.SKILLS for row in world.rows(of, skill, count, folder, seed)]

    write_jsonl(folder / "held_out.jsonl", rows(split, TEST_PICTURES, DRAWN_BEFORE))
    for seed in seeds:
        raw = folder / f"raw_{seed}.jsonl"
        write_jsonl(raw, rows("train", TRAIN_PICTURES, DRAWN_BEFORE + seed))
        config = {**settings(folder, seed), "train_data": [str(raw)], "output_dir": str(folder), "seed": seed}
        chosen = BalanceSettings(folder / f"balanced_{seed}.jsonl", top_p=1.0, top_k=0, chunk=TRAIN_PICTURES)
        balance(from_mapping(TrainConfig, config), chosen)
    return {
        "student before": str(MODELS / "student"),
        "teacher that sees": str(MODELS / "teacher"),
        "teacher that reads captions": str(MODELS / "reader"),
    }


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """What all arms share; 8 rollouts of each of 16 pictures a step."""
    return {
        "model": str(MODELS / "student"),
        "teachers": [{"name": "sees", "model": str(MODELS / "teacher"), "dtype": "float32"}],
        "method": "uni_opd",
        "uni_opd": {
            "balance": "group", "margin": "shift", "margin_statistic": "mean", "margin_direction": "lift",
            "margin_delta": 0.0,
        },
        "train_data": [str(folder / f"balanced_{seed}.jsonl")],
        "eval_data": [str(folder / "held_out.jsonl")],
        "verifier": f"{Path(world.__file__).resolve()}:verify",
        "verifier_workers": 1,
        "dtype": "float32",
        "loss_normalization": "sequence",
        "max_completion_length": world.LONGEST,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "max_steps": 60,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_ratio": 0.05,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "eval_steps": 20,
        "log_completions": False,
    }  # fmt: skip


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

STUDY = Study(
    "uni_opd_vl",
    ARMS,
    {"one": "one shape", "two": "two shapes"},
    prepare,
    settings,
    REPORTED,
    {"teacher that reads captions": "text"},
)
