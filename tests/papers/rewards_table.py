"""GRPO, arXiv 2402.03300, G-OPD, arXiv 2602.12125, CaMOPD's baselines, arXiv 2603.11137 and 2510.24021, and EOPD,
arXiv 2603.07079."""

from __future__ import annotations

import math

from paper_helpers import Row

GRPO: list[Row] = [
    ("loss_normalization", "sequence", "equation 3"),
    ("num_generations", 64, "section 4.2"),
    ("learning_rate", 1e-6, "section 4.2"),
    ("grpo.weight", 1.0, "equation 3"),
    ("grpo.scale_rewards", "group", "section 4.1.2"),
    ("grpo.epsilon", 0.2, "as in PPO and TRL"),
]
G_OPD: list[Row] = [
    ("divergence", "reverse_kl", "equation of J_G-OPD"),
    ("advantage.importance", "none", "unstated"),
    ("advantage.max_gap", math.inf, "unstated"),
    ("loss_normalization", "token", "unstated"),
    ("temperature", 1.0, "unstated"),
    ("g_opd.reference", "", "to be chosen"),
    ("g_opd.reward_scale", 1.25, "above 1 it is ExOPD"),
]
RELAXED: list[Row] = [
    ("divergence", "reverse_kl", "the log-ratio is its sample"),
    ("advantage.importance", "clip", "unstated"),
    ("advantage.max_gap", math.inf, "unstated"),
    ("loss_normalization", "token", "unstated"),
    ("relaxed_opd.mixture", 0.1, "unstated"),
    ("relaxed_opd.entropy_share", 1.0, "unstated"),
]
SELECTIVE: list[Row] = [
    ("loss_normalization", "token", "unstated"),
    ("selectkd.verify", "speculative", "Spec-k with the student's own token"),
    ("selectkd.rejected_weight", 0.0, "rejected tokens are masked"),
]

EOPD: list[Row] = [
    ("divergence", "reverse_kl", "abstract"),
    ("loss_normalization", "token", "unstated"),
    ("eopd.tau", 0.8, "as in arXiv 2606.19659, equation 26"),
]

PRESETS: dict[str, list[Row]] = {}
DEFAULTS: dict[str, list[Row]] = {
    "eopd": EOPD,
    "grpo": GRPO,
    "g_opd": G_OPD,
    "relaxed_opd": RELAXED,
    "selectkd": SELECTIVE,
}
SECTIONS: dict[str, tuple[str, set[str]]] = {
    "eopd": ("eopd", set()),
    "g_opd": ("g_opd", set()),
    "relaxed_opd": ("relaxed_opd", set()),
    "selectkd": ("selectkd", set()),
}
