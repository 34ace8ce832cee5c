"""Settings of the methods that weigh sampled tokens: sections of :class:`opdengine.config.TrainConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opdengine.errors import ConfigError


class Section:
    """Checks of one section's values; messages name the key as the user writes it."""

    section = ""

    def need(self, ok: bool, name: str, remedy: str) -> None:
        """Raise ConfigError unless ``ok``."""
        if not ok:
            raise ConfigError(f"{self.section}.{name}={getattr(self, name)!r} is not possible; {remedy}")

    def one_of(self, name: str, choices: Sequence[Any]) -> None:
        """Raise ConfigError unless the value is one of ``choices``."""
        self.need(getattr(self, name) in choices, name, f"choose one of {list(choices)}")


@dataclass(frozen=True)
class AdvantageConfig(Section):
    """The sampled-token reverse KL as a policy gradient, for the methods ``uni_opd`` and ``camopd``.

    What is null takes the value of the method's paper.

    Args:
        kl_mode: "sampled": every sampled token y has the advantage log q(y) - log p(y), as in the papers;
            "full_vocab": the divergence over the whole vocabulary in its place, of which that is a
            sample (less variance, more computation).
        importance: weight of a token by the ratio r of its probabilities in trainer and sampler: "none";
            "truncated": min(r, high); "band": r within [low, high], else 0; "clip": PPO's, r until it has
            moved out of [1 - low, 1 + high] in the direction of the advantage, then 0. Default: Uni-OPD
            clips, CaMOPD takes the band.
        low, high: the bounds. Default: clip 0.2 and 0.28, band 0.5 and 2, truncated 2.
        max_gap: tokens of which |log q(y) - log p(y)| (nats) reaches this carry no loss and are counted;
            ``.inf`` keeps all. Default: Uni-OPD 10, CaMOPD all.
    """

    section = "advantage"

    kl_mode: str = "sampled"
    importance: str | None = None
    low: float | None = None
    high: float | None = None
    max_gap: float | None = None

    def __post_init__(self) -> None:
        self.one_of("kl_mode", ("sampled", "full_vocab"))
        self.one_of("importance", (None, "none", "truncated", "band", "clip"))
        for name in ("low", "high"):
            value = getattr(self, name)
            self.need(value is None or value >= 0, name, "it must not be negative")
        self.need(self.max_gap is None or self.max_gap > 0, "max_gap", "it must be positive; .inf keeps all tokens")


@dataclass(frozen=True)
class UniOPDConfig(Section):
    """Uni-OPD (arXiv 2605.03677): what is added to the advantage, and which rollouts are kept.

    Args:
        correct_from: a rollout is correct when its reward is at least this.
        balance: keep correct and incorrect rollouts in proportion: in each prompt's "group", in the
            whole step ("global"), or "none". Sets with only one kind are kept.
        balance_ratio: correct to incorrect; 0 keeps incorrect ones only, ``.inf`` correct ones only.
        keep_per_prompt: keep at most this many rollouts of a prompt after balancing, in the same
            proportion. With more ``num_generations`` than this, what balancing drops is made up for.
        margin: "shift" the returns of correct and incorrect rollouts apart until their margin is
            ``margin_delta``; "mask" the rollouts that narrow it; "fixed": always ``margin_delta``, whatever the
            margin is (the control); or "none".
        margin_statistic: margin between "mean" returns, or "minmax": worst correct and best incorrect.
        margin_scope: over each prompt's "group" or over the whole step ("global").
        margin_delta: the wanted margin, nats per token.
        margin_direction: what moves: "lift" correct up, "push_down" incorrect down, "spread" both by half.
    """

    section = "uni_opd"

    correct_from: float = 1.0
    balance: str = "group"
    balance_ratio: float = 1.0
    keep_per_prompt: int | None = None
    margin: str = "shift"
    margin_statistic: str = "mean"
    margin_scope: str = "group"
    margin_delta: float = 0.4
    margin_direction: str = "spread"

    def __post_init__(self) -> None:
        self.need(0 < self.correct_from <= 1, "correct_from", "rewards lie in [0, 1]")
        self.one_of("balance", ("group", "global", "none"))
        self.need(self.balance_ratio >= 0, "balance_ratio", "it must not be negative")
        keep = self.keep_per_prompt
        self.need(keep is None or keep >= 1, "keep_per_prompt", "it must be at least 1, or null for no limit")
        self.one_of("margin", ("shift", "mask", "fixed", "none"))
        self.one_of("margin_statistic", ("mean", "minmax"))
        self.one_of("margin_scope", ("group", "global"))
        self.need(math.isfinite(self.margin_delta), "margin_delta", "it must be finite")
        self.one_of("margin_direction", ("lift", "spread", "push_down"))


SCORES = ("abs", "pos", "signed", "sq")


@dataclass(frozen=True)
class CaMOPDConfig(Section):
    """CaMOPD (arXiv 2605.27115): recover general skills of a specialised student, keep the special one.

    Args:
        domain: routing keys (``data_source``) of the special domain; all other prompts are general. The
            domain's teachers have these keys, the general teachers have none of them.
        schedule: "alternating": ``n_general`` general steps, then one of the domain; "mixed": both in each
            step, ``n_general`` : 1.
        n_general: see above.
        selection: rollouts to train on: "mass": those with the largest scores that together hold ``rho`` of
            the summed scores; "topk_frac": the ``rho`` with the largest scores; "random": as many as "mass"
            would take, any (the control); "none": all.
        rho_g, rho_d: for general and domain rollouts.
        score_g, score_d: score of a rollout, mean over its tokens of the gap d = log q(y) - log p(y): "abs" |d|,
            "pos" max(d, 0), "signed" d, "sq" d * d.
        r_g, r_d: multiply the loss of general and domain rollouts.
        min_tokens: rollouts of fewer tokens are left out and counted.
        diagnose_steps: every so many steps, measure how much the selected rollouts agree (against a random
            choice of the same size) and whether the branches' gradients oppose each other; 0 is never.
        diagnose_samples: rollouts that take part in each measurement.
        diagnose_draws: random choices to compare with.
        diagnose_dimensions: of the random projection in which gradients are compared.
    """

    section = "camopd"

    domain: list[str] = field(default_factory=list)
    schedule: str = "alternating"
    n_general: int = 3
    selection: str = "mass"
    rho_g: float = 0.8
    rho_d: float = 0.8
    score_g: str = "abs"
    score_d: str = "pos"
    r_g: float = 2.0
    r_d: float = 1.0
    min_tokens: int = 0
    diagnose_steps: int = 0
    diagnose_samples: int = 32
    diagnose_draws: int = 20
    diagnose_dimensions: int = 4096

    def __post_init__(self) -> None:
        self.one_of("schedule", ("alternating", "mixed"))
        self.need(self.n_general >= 1, "n_general", "it must be at least 1")
        self.one_of("selection", ("mass", "topk_frac", "random", "none"))
        for name in ("rho_g", "rho_d"):
            self.need(0 < getattr(self, name) <= 1, name, "it is a share in (0, 1]; selection: none keeps all")
        for name in ("score_g", "score_d"):
            self.one_of(name, SCORES)
        for name in ("r_g", "r_d"):
            self.need(0 < getattr(self, name) < math.inf, name, "it must be positive")
        for name in ("min_tokens", "diagnose_steps"):
            self.need(getattr(self, name) >= 0, name, "it must not be negative")
        for name in ("diagnose_draws", "diagnose_dimensions"):
            self.need(getattr(self, name) >= 1, name, "it must be at least 1")
        self.need(self.diagnose_samples >= 2, "diagnose_samples", "agreement needs at least 2")
