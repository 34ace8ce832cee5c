"""ULD, arXiv 2402.12030, and GOLD as in TRL 1.16."""

from __future__ import annotations

import math

from paper_helpers import Row

GOLD: list[Row] = [
    ("advantage.kl_mode", "full_vocab", "equation 6"),
    ("advantage.importance", "none", "unstated"),
    ("advantage.max_gap", math.inf, "unstated"),
    ("loss_normalization", "sequence", "as in TRL"),
    ("num_generations", 1, "as in TRL"),
    ("temperature", 0.9, "as in TRL"),
    ("top_p", 0.95, "as in TRL"),
    ("learning_rate", 1e-7, "as in TRL"),
    ("gold.uld_use_hybrid_loss", True, "GOLD; false is ULD, and TRL's default"),
]

PRESETS: dict[str, list[Row]] = {}
DEFAULTS: dict[str, list[Row]] = {"gold": GOLD}
SECTIONS: dict[str, tuple[str, set[str]]] = {"gold": ("gold", set())}
