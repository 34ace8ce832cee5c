"""Sections of the configuration that belong to a method, checked when they are read."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from opdengine.config.sections import (
    COUNT,
    COUNT_OR_NONE,
    FACTOR,
    PENALTY,
    POSITIVE,
    SEED,
    SHARE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Range,
    Section,
    at_home,
    by_key,
)


@dataclass(frozen=True)
class DebateConfig(Section):
    """The debate of MAD-OPD (arXiv 2605.01347, section 4.1, equation 7).

    Args:
        rounds: R; round 1 is blind.
        temperature, top_p, top_k, repetition_penalty: how teachers are sampled.
        max_tokens: new tokens of one teacher in one round.
        prompts: "generic", "tools", "code", a mapping of :class:`DebatePrompts` fields, or a
            mapping from routing key (and "default") to one of these.
        use_confidence: ask for confidences and weigh teachers by them; off: uniform weights.
        use_transcript: teachers judge the student under the transcript; off: under the plain
            prompt (only the confidences are used).
        tau: temperature of the softmax over confidence / 100; ``.inf`` makes the weights uniform in the very
            debates of other values (``use_confidence: false`` also changes what the teachers are asked).
        cache_dir: debates are stored here and never generated twice; default: a folder in
            ``output_dir``. Share it between runs.
        seed: seed of the debate; part of the cache key.
    """

    section = "debate"

    rounds: int = 2
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    repetition_penalty: float = 1.1
    max_tokens: int = 4096
    prompts: str | dict[str, Any] = "generic"
    use_confidence: bool = True
    use_transcript: bool = True
    tau: float = 1.0
    cache_dir: str | None = None
    seed: int = 0

    ranges: ClassVar[Mapping[str, Range]] = {
        "rounds": Range(1, 1000),
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "top_k": TOP_K,
        "repetition_penalty": PENALTY,
        "max_tokens": COUNT,
        "tau": dataclasses.replace(POSITIVE, also=(math.inf,)),
        "seed": SEED,
    }

    def prompts_of(self, key: str) -> str | dict[str, Any]:
        """The prompt family for a routing key, by name or by its fields.

        Raises:
            ConfigError: the mapping has neither the key nor "default".
        """
        if isinstance(self.prompts, dict) and "first" not in self.prompts:
            return by_key(self.prompts, key, "debate.prompts")
        return self.prompts

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_dir", at_home(self.cache_dir))
        self.not_blank("cache_dir", "prompts")
        self.in_range()


@dataclass(frozen=True)
class OpadConfig(Section):
    """Which steps of a trajectory become training states (OPAD; arXiv 2605.01347, section 4.4).

    Args:
        sampling: "all" steps, "uniform" or by "surprise": in proportion to the mean negative log-prob of
            what the student did there.
        steps_per_trajectory: how many; None is all. With few, a long trajectory weighs no more than a short
            one. Turns that are left out are counted (``dropped/not_chosen``).
    """

    section = "opad"

    sampling: str = "all"
    steps_per_trajectory: int | None = None

    ranges: ClassVar[Mapping[str, Range]] = {
        "steps_per_trajectory": Range(1, 10**9, remedy="it must be at least 1, or null for all")
    }

    def __post_init__(self) -> None:
        self.in_range()
        self.one_of("sampling", ("all", "uniform", "surprise"))


JUDGE_FIELDS = (
    *("task_type", "task_goal", "scene_description", "last_obs", "admissible", "admissible_count", "llm_text"),
    *("history", "next_obs"),
)
"""What a judge can be told about a turn (arXiv 2606.19659, table 9; the last two are ours)."""


@dataclass(frozen=True)
class SageConfig(Section):
    """SAGE-OPD (arXiv 2606.19659, sections 3.3 to 3.5).

    Args:
        alpha: weight of a turn judged WEAK (equation 7).
        use_failures: weight 1 without asking where the environment reports a failure, or the turn is empty or was
            cut off by ``max_completion_length``.
        use_judge: ask the teacher about the other turns; off: all have weight 1.
        use_confidence: multiply with the teacher's mean largest probability (equations 8 to 10).
        normalization: what N of equation 11 counts: "all_tokens", "active_tokens" (of turns with
            weight), or "none" for Z = 1.
        normalization_scope: Z over the whole "batch" (all processes) or over each "trajectory".
        eps: least denominator of Z.
        z_max: bound of Z; None is unbounded.
        judge_temperature, judge_max_tokens: how the teacher is sampled as a judge.
        judge_fallback: weight where its reply holds no label.
        judge_history: show it the turns before.
        judge_next_observation: show it what happened then.
        judge_prompt: a format string in place of our own, with ``{llm_text}`` and any other of
            :data:`JUDGE_FIELDS`.
        admissible_count: most possible actions shown.
        confidence_temperature: of the distributions whose largest probability is taken.
        kl_mode: "full_vocab": the divergence over the whole vocabulary; "sampled": log q(y) - log p(y) of the
            sampled tokens as a policy gradient, of which that is the mean where temperature and top_p are 1
            and top_k is 0 (the paper does not say which).
        intervention: "judge"; "random" gives the same weights to other turns, "inverted" the largest to
            those that got the smallest (controls).
    """

    section = "sage"

    alpha: float = 0.5
    use_failures: bool = True
    use_judge: bool = True
    use_confidence: bool = True
    normalization: str = "all_tokens"
    normalization_scope: str = "batch"
    eps: float = 1e-8
    z_max: float | None = None
    judge_temperature: float = 0.0
    judge_max_tokens: int = 1028
    judge_fallback: float = 1.0
    judge_history: bool = False
    judge_next_observation: bool = False
    judge_prompt: str | None = None
    admissible_count: int = 30
    confidence_temperature: float = 1.0
    kl_mode: str = "full_vocab"
    intervention: str = "judge"

    ranges: ClassVar[Mapping[str, Range]] = {
        "alpha": Range(0, 1, remedy="it lies between SKIP's 0 and STRONG's 1"),
        "eps": Range(1e-30, 1),
        "z_max": POSITIVE,
        "judge_temperature": TEMPERATURE,
        "judge_max_tokens": COUNT,
        "judge_fallback": SHARE,
        "admissible_count": Range(0, 10**6, remedy="it must not be negative; 0 lists none"),
        "confidence_temperature": Range(
            0.01, 1000, remedy="at 0 every confidence is 1: set sage.use_confidence to false for that"
        ),
    }

    def __post_init__(self) -> None:
        self.in_range()
        self.one_of("normalization", ("all_tokens", "active_tokens", "none"))
        self.one_of("normalization_scope", ("batch", "trajectory"))
        self.one_of("kl_mode", ("full_vocab", "sampled"))
        self.one_of("intervention", ("judge", "random", "inverted"))
        if self.judge_prompt is not None:
            self.need("llm_text" in self._fields(), "judge_prompt", "the judge must see {llm_text}, what was written")

    def _fields(self) -> set[str]:
        """The placeholders of the judge's prompt."""
        try:
            used = {field for _, field, _, _ in string.Formatter().parse(str(self.judge_prompt)) if field is not None}
        except ValueError as error:
            self.need(False, "judge_prompt", f"it is no format string ({error}); write {{{{ and }}}} for braces")
        unknown = sorted(used - set(JUDGE_FIELDS))
        self.need(not unknown, "judge_prompt", f"it has no placeholder {unknown}; it may use {list(JUDGE_FIELDS)}")
        return used


@dataclass(frozen=True)
class TcodConfig(Section):
    """Turn curriculum (TCOD; arXiv 2606.19659, equation 25): ``k_start + eta * updates`` first turns.

    Args:
        k_start: how many first turns at the beginning.
        eta: how many more after every update.
    """

    section = "tcod"

    k_start: int = 1
    eta: float = 1.0

    ranges: ClassVar[Mapping[str, Range]] = {
        "k_start": COUNT,
        "eta": Range(0, 1e6, remedy="it lies between 0 and 1e6; 0 keeps k_start turns"),
    }

    def __post_init__(self) -> None:
        self.in_range()


@dataclass(frozen=True)
class EntropyConfig(Section):
    """Entropy-aware OPD (arXiv 2606.19659, equation 26).

    Args:
        alpha: tokens on which the teacher is uncertain have the weight 1 + ``alpha``, others 1.
        tau: the entropy of the teacher above which it is, nats.
    """

    section = "entropy_opd"

    alpha: float = 1.0
    tau: float = 0.8

    ranges: ClassVar[Mapping[str, Range]] = {
        "alpha": Range(0, 1e6, remedy="it lies between 0 and 1e6; 0 is plain OPD"),
        "tau": Range(0, 1000, also=(math.inf,), remedy="it is an entropy in nats; .inf makes no token uncertain"),
    }

    def __post_init__(self) -> None:
        self.in_range()


@dataclass(frozen=True)
class AdvantageConfig(Section):
    """The sampled-token reverse KL as a policy gradient, for the methods ``uni_opd`` and ``camopd``.

    What is null takes the value of the method's paper.

    Args:
        kl_mode: "sampled": every sampled token y has the advantage log q(y) - log p(y), as in the papers;
            "full_vocab": the divergence over the whole vocabulary in its place, of which that is a
            sample (less variance, more computation).
        importance: weight of a token by a ratio r of its probabilities: "none"; "truncated": min(r, high); "band":
            r within [low, high], else 0; "clip": PPO's, r until it has moved out of [1 - low, 1 + high] in the
            direction of the advantage, then 0. In "clip" r is the policy now over the policy that sampled, which
            is 1 with ``max_staleness`` 0; in the others trainer over sampler, both after temperature, top-k,
            top-p and penalty. Default: Uni-OPD clips, CaMOPD takes the band.
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

    ranges: ClassVar[Mapping[str, Range]] = {
        "low": FACTOR,
        "high": FACTOR,
        "max_gap": Range(0, 1e6, open_low=True, also=(math.inf,), remedy="it must be positive; .inf keeps all tokens"),
    }

    def __post_init__(self) -> None:
        self.in_range()
        self.one_of("kl_mode", ("sampled", "full_vocab"))
        self.one_of("importance", (None, "none", "truncated", "band", "clip"))


@dataclass(frozen=True)
class UniOPDConfig(Section):
    """Uni-OPD (arXiv 2605.03677): what is added to the advantage, and which rollouts are kept.

    Args:
        correct_from: a rollout is correct when its reward is at least this.
        balance: keep correct and incorrect rollouts in proportion: in each prompt's "group", in the
            whole step ("global"), or "none". Sets with only one kind are kept. With ``contexts: debate`` every
            prompt is debated, also one of which nothing is kept (only "global" does that).
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

    ranges: ClassVar[Mapping[str, Range]] = {
        "correct_from": Range(0, 1, open_low=True, remedy="it lies in (0, 1], as rewards lie in [0, 1]"),
        "balance_ratio": Range(0, 1e6, also=(math.inf,)),
        "keep_per_prompt": Range(1, 10**9, remedy="it must be at least 1, or null for no limit"),
        "margin_delta": Range(-1e6, 1e6),
    }

    def __post_init__(self) -> None:
        self.in_range()
        self.one_of("balance", ("group", "global", "none"))
        self.one_of("margin", ("shift", "mask", "fixed", "none"))
        self.one_of("margin_statistic", ("mean", "minmax"))
        self.one_of("margin_scope", ("group", "global"))
        self.one_of("margin_direction", ("lift", "spread", "push_down"))


SCORES = ("abs", "pos", "signed", "sq")
PART = Range(0, 1, open_low=True, remedy="it is a share in (0, 1]; selection: none keeps all")


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

    ranges: ClassVar[Mapping[str, Range]] = {
        "n_general": COUNT,
        "rho_g": PART,
        "rho_d": PART,
        "r_g": POSITIVE,
        "r_d": POSITIVE,
        "min_tokens": COUNT_OR_NONE,
        "diagnose_steps": COUNT_OR_NONE,
        "diagnose_samples": Range(2, 10**6, remedy="agreement needs at least 2, and at most 1e6"),
        "diagnose_draws": Range(1, 10**6),
        "diagnose_dimensions": Range(1, 10**7),
    }

    def __post_init__(self) -> None:
        self.in_range()
        self.one_of("schedule", ("alternating", "mixed"))
        self.one_of("selection", ("mass", "topk_frac", "random", "none"))
        for name in ("score_g", "score_d"):
            self.one_of(name, SCORES)
