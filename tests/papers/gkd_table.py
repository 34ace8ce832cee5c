"""GKD, arXiv 2306.13649, with the defaults of TRL 1.16."""

from __future__ import annotations

from paper_helpers import Row

GKD: list[Row] = [
    ("gkd.lmbda", 0.5, "as in TRL"),
    ("gkd.seq_kd", False, "as in TRL"),
    ("gkd.sft_alpha", 0.0, "the paper has none"),
    ("gkd.completion_column", "completion", "as in TRL"),
    ("divergence", "jsd", "as in TRL"),
    ("jsd_beta", 0.5, "as in TRL"),
    ("loss_normalization", "token", "as in TRL"),
    ("num_generations", 1, "as in TRL"),
    ("temperature", 0.9, "as in TRL"),
]

PRESETS: dict[str, list[Row]] = {}
DEFAULTS: dict[str, list[Row]] = {"gkd": GKD}
SECTIONS: dict[str, tuple[str, set[str]]] = {"gkd": ("gkd", set())}
