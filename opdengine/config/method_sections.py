"""Sections of the configuration that belong to a method, one for each paper.

They stand here and not in the methods' files because :class:`opdengine.config.train.TrainConfig` names them as types:
what a method reads (``config.sage.alpha``) is known to a type checker, and this room imports no method.
"""

from __future__ import annotations

import math
import string
from dataclasses import field
from typing import Annotated, Any, Literal

from opdengine.config.fields import (
    BY_SHAPE,
    AsMapping,
    AsText,
    Choice,
    Count,
    CountOrNone,
    Factor,
    Filled,
    FilledPath,
    Flag,
    Free,
    Integer,
    Listed,
    Maybe,
    Penalty,
    Positive,
    PositiveOrInf,
    Range,
    Real,
    Seed,
    Share,
    Temperature,
    Text,
    TopK,
    TopP,
)
from opdengine.config.section import Changeable, Resumable, Section, settings
from opdengine.config.sections import by_key

Limit = Annotated[Integer, Range(1, 10**9, remedy="it must be at least 1, or null for all")]


@settings
class DebateConfig(Section):
    """The debate of MAD-OPD (arXiv 2605.01347, section 4.1, equation 7)."""

    section = "debate"

    rounds: Annotated[Integer, Range(1, 1000)] = 2
    """R; round 1 is blind."""
    temperature: Temperature = 0.7
    """of the teachers' sampling; 0 is greedy."""
    top_p: TopP = 0.8
    """of the teachers' sampling."""
    top_k: TopK = 20
    """of the teachers' sampling; 0 is all tokens."""
    repetition_penalty: Penalty = 1.1
    """of the teachers' sampling; 1 is off."""
    max_tokens: Count = 4096
    """new tokens of one teacher in one round."""
    prompts: Annotated[Annotated[Filled, AsText] | Annotated[Free, AsMapping], BY_SHAPE] = "generic"
    """as named: "generic", "tools", "code", a mapping of :class:`DebatePrompts` fields, or a mapping from routing key
    (and "default") to one of these."""
    use_confidence: Flag = True
    """ask for confidences and weigh teachers by them; off: uniform weights."""
    use_transcript: Flag = True
    """teachers judge the student under the transcript; off: under the plain prompt (only the confidences are used)."""
    tau: PositiveOrInf = 1.0
    """temperature of the softmax over confidence / 100; ``.inf`` makes the weights uniform in the very debates of other
    values (``use_confidence: false`` also changes what the teachers are asked)."""
    cache_dir: Resumable[Maybe[FilledPath]] = None
    """debates are stored here and never generated twice; default: a folder in ``output_dir``. Share it between runs."""
    seed: Seed = 0
    """seed of the debate; part of the cache key."""

    def prompts_of(self, key: str) -> str | dict[str, Any]:
        """The prompt family for a routing key, by name or by its fields.

        Raises:
            ConfigError: the mapping has neither the key nor "default".
        """
        if isinstance(self.prompts, dict) and "first" not in self.prompts:
            found: str | dict[str, Any] = by_key(self.prompts, key, "debate.prompts")
            return found
        return self.prompts


@settings
class OpadConfig(Section):
    """Which steps of a trajectory become training states (OPAD; arXiv 2605.01347, section 4.4)."""

    section = "opad"

    sampling: Choice[Literal["all", "uniform", "surprise"]] = "all"
    """which steps: "all", "uniform" or by "surprise": in proportion to the mean negative log-prob of what the student
    did there."""
    steps_per_trajectory: Maybe[Limit] = None
    """how many; None is all. With few, a long trajectory weighs no more than a short one. Turns that are left out are
    counted (``dropped/not_chosen``)."""


JUDGE_FIELDS = (
    *("task_type", "task_goal", "scene_description", "last_obs", "admissible", "admissible_count", "llm_text"),
    *("history", "next_obs"),
)
"""What a judge can be told about a turn (arXiv 2606.19659, table 9; the last two are ours)."""

Confidence = Range(0.01, 1000, remedy="at 0 every confidence is 1: set sage.use_confidence to false for that")


@settings
class SageConfig(Section):
    """SAGE-OPD (arXiv 2606.19659, sections 3.3 to 3.5)."""

    section = "sage"

    alpha: Annotated[Real, Range(0, 1, remedy="it lies between SKIP's 0 and STRONG's 1")] = 0.5
    """weight of a turn judged WEAK (equation 7)."""
    use_failures: Flag = True
    """weight 1 without asking where the environment reports a failure, or the turn is empty or was cut off by
    ``max_completion_length``."""
    use_judge: Flag = True
    """ask the teacher about the other turns; off: all have weight 1."""
    use_confidence: Flag = True
    """multiply with the teacher's mean largest probability (equations 8 to 10)."""
    normalization: Choice[Literal["all_tokens", "active_tokens", "none"]] = "all_tokens"
    """what N of equation 11 counts: "all_tokens", "active_tokens" (of turns with weight), or "none" for Z = 1."""
    normalization_scope: Choice[Literal["batch", "trajectory"]] = "batch"
    """Z over the whole "batch" (all processes) or over each "trajectory"."""
    eps: Annotated[Real, Range(1e-30, 1)] = 1e-8
    """least denominator of Z."""
    z_max: Maybe[Positive] = None
    """bound of Z; None is unbounded."""
    judge_temperature: Temperature = 0.0
    """of the judge's sampling; 0 is greedy."""
    judge_max_tokens: Count = 1028
    """most tokens of the judge's reply."""
    judge_fallback: Share = 1.0
    """weight where its reply holds no label."""
    judge_history: Flag = False
    """show it the turns before."""
    judge_next_observation: Flag = False
    """show it what happened then."""
    judge_prompt: Maybe[Text] = None
    """a format string in place of our own, with ``{llm_text}`` and any other of :data:`JUDGE_FIELDS`."""
    admissible_count: Annotated[Integer, Range(0, 10**6, remedy="it must not be negative; 0 lists none")] = 30
    """most possible actions shown."""
    confidence_temperature: Annotated[Real, Confidence] = 1.0
    """of the distributions whose largest probability is taken."""
    kl_mode: Choice[Literal["full_vocab", "sampled"]] = "full_vocab"
    """the divergence over the whole vocabulary ("full_vocab"), or "sampled": log q(y) - log p(y) of the sampled tokens
    as a policy gradient, of which that is the mean where temperature and top_p are 1 and top_k is 0 (the paper does
    not say which)."""
    intervention: Choice[Literal["judge", "random", "inverted"]] = "judge"
    """whose weights: the "judge"'s; "random" gives the same weights to other turns, "inverted" the largest to those
    that got the smallest (controls)."""

    def __post_init__(self) -> None:
        if self.judge_prompt is not None:
            self.need("llm_text" in self._fields(), "judge_prompt", "the judge must see {llm_text}, what was written")

    def _fields(self) -> set[str]:
        """The placeholders of the judge's prompt."""
        used: set[str] = set()
        try:
            used = {field for _, field, _, _ in string.Formatter().parse(str(self.judge_prompt)) if field is not None}
        except ValueError as error:
            self.need(False, "judge_prompt", f"it is no format string ({error}); write {{{{ and }}}} for braces")
        unknown = sorted(used - set(JUDGE_FIELDS))
        self.need(not unknown, "judge_prompt", f"it has no placeholder {unknown}; it may use {list(JUDGE_FIELDS)}")
        return used


@settings
class TcodConfig(Section):
    """Turn curriculum (TCOD; arXiv 2606.19659, equation 25): ``k_start + eta * updates`` first turns."""

    section = "tcod"

    k_start: Count = 1
    """how many first turns at the beginning."""
    eta: Annotated[Real, Range(0, 1e6, remedy="it lies between 0 and 1e6; 0 keeps k_start turns")] = 1.0
    """how many more after every update."""


Entropy = Range(0, 1000, also=(math.inf,), remedy="it is an entropy in nats; .inf makes no token uncertain")


@settings
class EntropyConfig(Section):
    """Entropy-aware OPD (arXiv 2606.19659, equation 26)."""

    section = "entropy_opd"

    alpha: Annotated[Real, Range(0, 1e6, remedy="it lies between 0 and 1e6; 0 is plain OPD")] = 1.0
    """tokens on which the teacher is uncertain have the weight 1 + ``alpha``, others 1."""
    tau: Annotated[Real, Entropy] = 0.8
    """the entropy of the teacher above which it is, nats."""


@settings
class EOPDConfig(Section):
    """EOPD (arXiv 2603.07079): the divergence of every token by the teacher's entropy."""

    section = "eopd"

    tau: Annotated[Real, Entropy] = 0.8
    """the entropy of the teacher above which a token has the forward KL, nats."""


@settings
class SdftConfig(Section):
    """SDFT (arXiv 2601.19897): the student, shown a demonstration, teaches itself."""

    section = "sdft"

    num_loss_tokens_to_skip: CountOrNone = 0
    """the first tokens of a rollout that carry no loss: there the teacher speaks of the demonstration that it sees."""


@settings
class MTSeqKDConfig(Section):
    """Supervised on what teachers wrote, or, in an environment, on the episodes that they played."""

    section = "mt_seqkd"

    successful_only: Flag = False
    """in an environment: learn only from episodes in which the teacher succeeded; the others are counted, as
    ``dropped/unsuccessful``."""


@settings
class GkdConfig(Section):
    """GKD's mixture (arXiv 2306.13649): answers of the student, and given ones. Names are those of TRL and ms-swift."""

    section = "gkd"

    lmbda: Share = 1.0
    """share of the prompts of a step that the student answers itself; each of the others is given an answer, on which
    the teachers judge it. 1 is on-policy distillation, 0 supervised."""
    seq_kd: Flag = False
    """the given answer is one that a teacher of the prompt has written, once, as the student is sampled."""
    completion_column: Text = "completion"
    """the column with recorded answers: text, or one message of the assistant."""
    sft_alpha: Factor = 0.0
    """weight of -log p of given answers beside the divergence; 0 is none."""

    def __post_init__(self) -> None:
        for name in ("seq_kd", "completion_column", "sft_alpha") if self.lmbda == 1 else ():
            plain = getattr(self, name) == getattr(GkdConfig, name)
            self.need(plain, name, "it has no effect with gkd.lmbda: 1, which gives no answer; lower that")
        plain = self.completion_column == GkdConfig.completion_column
        self.need(plain or not self.seq_kd, "completion_column", "with gkd.seq_kd teachers write the answers")


@settings
class GrpoConfig(Section):
    """The group-relative policy gradient (GRPO, arXiv 2402.03300) beside a distillation. Names are those of TRL."""

    section = "grpo"

    weight: Factor = 0.0
    """of the rewards' advantages beside the method's own weights; 0 is none. The verifier, or the environment, grades
    the rollouts."""
    scale_rewards: Choice[Literal["group", "batch", "none"]] = "group"
    """over what the standard deviation is taken that rewards are divided by: each prompt's "group", the whole step
    ("batch"), or "none"."""
    epsilon: Share = 0.2
    """PPO's clip: how far the ratio to the policy that sampled may fall."""
    epsilon_high: Maybe[Factor] = None
    """how far it may rise; null is ``epsilon``."""


@settings
class GOPDConfig(Section):
    """G-OPD (arXiv 2602.12125): reward scaling against a reference."""

    section = "g_opd"

    reference: Text = ""
    """name of the teacher that is the reference: the student as it began (``model: self, weights: base``), or what the
    teacher was before its reinforcement learning."""
    reward_scale: Annotated[Real, Range(0, 100, open_low=True)] = 1.25
    """lambda, the weight of the teachers; the reference has 1 - lambda. 1 is plain OPD, above it the student goes
    beyond its teacher (ExOPD)."""


@settings
class RelaxedOPDConfig(Section):
    """Relaxed OPD (arXiv 2603.11137): bounded rewards on uncertain tokens."""

    section = "relaxed_opd"

    mixture: Annotated[Real, Range(0, 1, open_low=True, open_high=True)] = 0.1
    """m: no reward is below log(m / (1 - m)), nats."""
    entropy_share: Annotated[Real, Range(0, 1, open_low=True, remedy="it lies in (0, 1]; 1 is every token")] = 1.0
    """train on this share of each rollout's tokens, those of which the student is least certain."""


@settings
class SelecTKDConfig(Section):
    """SelecTKD (arXiv 2510.24021): tokens that the teacher accepts."""

    section = "selectkd"

    verify: Choice[Literal["speculative", "greedy"]] = "speculative"
    """a token is accepted with probability min(1, q / p) ("speculative"), or where it is the teacher's likeliest
    ("greedy")."""
    rejected_weight: Share = 0.0
    """of a token that is not."""


@settings
class GoldConfig(Section):
    """GOLD and ULD (arXiv 2402.12030): the divergence to a teacher with another tokenizer. Names are those of TRL."""

    section = "gold"

    uld_use_hybrid_loss: Flag = True
    """compare tokens that both vocabularies have by ``divergence``, and only the others sorted (GOLD); off: all of them
    sorted (ULD)."""
    uld_hybrid_matched_weight: Maybe[Factor] = None
    """of the tokens that both have; null is their share of the teacher's vocabulary. Set both or neither."""
    uld_hybrid_unmatched_weight: Maybe[Factor] = None
    """of the others; null is 1 less that share."""

    def __post_init__(self) -> None:
        one, other = self.uld_hybrid_matched_weight, self.uld_hybrid_unmatched_weight
        name = "uld_hybrid_matched_weight" if one is None else "uld_hybrid_unmatched_weight"
        self.need((one is None) == (other is None), name, "set both weights or neither")
        self.need(one is None or self.uld_use_hybrid_loss, "uld_hybrid_matched_weight",
                  "it belongs to uld_use_hybrid_loss: true")  # fmt: skip


@settings
class SdpoConfig(Section):
    """SDPO (arXiv 2601.20802): the student, shown what succeeded and what went wrong, teaches itself.

    Names are those of TRL. The policy gradient's own settings stand in ``advantage``, those of the rewards in
    ``grpo``.
    """

    section = "sdpo"

    distillation_weight: Share = 1.0
    """weight w of the distillation; the group-relative policy gradient has 1 - w."""
    use_successful_as_teacher: Flag = True
    """show a successful rollout of the same prompt."""
    success_reward_threshold: Annotated[Real, Range(0, 1, open_low=True)] = 1.0
    """a rollout is successful when its reward is at least this."""
    dont_reprompt_on_self_success: Flag = True
    """never show a rollout to the judge of itself."""
    include_environment_feedback: Flag = False
    """show the feedback: the column ``privileged_context``, or else what the verifier, or at its end the environment,
    said of a rollout that failed."""
    environment_feedback_only_without_solution: Flag = False
    """show it only where no successful rollout is shown."""
    remove_thinking_from_demonstration: Flag = False
    """show a successful rollout without its thoughts."""
    reprompt_template: Filled = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    """what the teacher reads in place of the user's last message."""
    solution_template: Filled = "\nCorrect solution:\n\n{successful_previous_attempt}\n\n"
    """becomes ``{solution}`` there; empty where none is shown."""
    feedback_template: Filled = (
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n"
    )
    """becomes ``{feedback}`` there; empty where none is shown."""

    def __post_init__(self) -> None:
        shown = self.use_successful_as_teacher or self.include_environment_feedback
        self.need(
            shown or self.distillation_weight == 0, "use_successful_as_teacher",
            "with include_environment_feedback: false the teacher would be shown nothing; turn one on",
        )  # fmt: skip
        for name, fields in SDPO_FIELDS.items():
            text, used = getattr(self, name), set[str]()
            try:
                used = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
            except ValueError as error:
                self.need(False, name, f"it is no format string ({error}); write {{{{ and }}}} for braces")
            self.need(used == fields, name, f"it must have the placeholders {sorted(fields)} and no other")
        for switch, names in SDPO_PARTS.items():
            for name in names if not getattr(self, switch) else ():
                plain = getattr(self, name) == getattr(SdpoConfig, name)
                self.need(plain, name, f"it has no effect with {switch}: false; leave it out, or set {switch}: true")


SDPO_PARTS = {
    "use_successful_as_teacher": (
        "dont_reprompt_on_self_success",
        "remove_thinking_from_demonstration",
        "environment_feedback_only_without_solution",
        "solution_template",
    ),
    "include_environment_feedback": ("environment_feedback_only_without_solution", "feedback_template"),
}
"""Settings that belong to what is shown."""

SDPO_FIELDS = {
    "reprompt_template": {"prompt", "solution", "feedback"},
    "solution_template": {"successful_previous_attempt"},
    "feedback_template": {"feedback_raw"},
}


Gap = Range(0, 1e6, open_low=True, also=(math.inf,), remedy="it must be positive; .inf keeps all tokens")


@settings
class AdvantageConfig(Section):
    """The sampled-token reverse KL as a policy gradient, for the methods ``uni_opd``, ``camopd`` and ``sdpo``.

    What is null takes the value of the method's paper.
    """

    section = "advantage"

    kl_mode: Choice[Literal["full_vocab", "sampled"]] = "sampled"
    """where "sampled", every sampled token y has the advantage log q(y) - log p(y), as in the papers; "full_vocab" is
    the divergence over the whole vocabulary in its place, of which that is a sample (less variance, more
    computation)."""
    importance: Maybe[Choice[Literal["none", "truncated", "band", "clip"]]] = None
    """weight of a token by a ratio r of its probabilities: "none"; "truncated": min(r, high); "band": r within [low,
    high], else 0; "clip": PPO's, r until it has moved out of [1 - low, 1 + high] in the direction of the advantage,
    then 0. In "clip" r is the policy now over the policy that sampled, which is 1 with ``max_staleness`` 0; in the
    others trainer over sampler, both after temperature, top-k, top-p and penalty. Default: Uni-OPD clips, CaMOPD takes
    the band."""
    low: Maybe[Factor] = None
    """the lower bound. Default: clip 0.2, band 0.5."""
    high: Maybe[Factor] = None
    """the upper bound. Default: clip 0.28, band 2, truncated 2."""
    max_gap: Maybe[Annotated[Real, Gap]] = None
    """tokens of which |log q(y) - log p(y)| (nats) reaches this carry no loss and are counted; ``.inf`` keeps all.
    Default: Uni-OPD 10, CaMOPD all."""


Reward = Range(0, 1, open_low=True, remedy="it lies in (0, 1], as rewards lie in [0, 1]")


@settings
class UniOPDConfig(Section):
    """Uni-OPD (arXiv 2605.03677): what is added to the advantage, and which rollouts are kept."""

    section = "uni_opd"

    correct_from: Annotated[Real, Reward] = 1.0
    """a rollout is correct when its reward is at least this."""
    balance: Choice[Literal["group", "global", "none"]] = "group"
    """keep correct and incorrect rollouts in proportion: in each prompt's "group", in the whole step ("global"), or
    "none". Sets with only one kind are kept. With ``contexts: debate`` every prompt is debated, also one of which
    nothing is kept (only "global" does that)."""
    balance_ratio: Annotated[Real, Range(0, 1e6, also=(math.inf,))] = 1.0
    """correct to incorrect; 0 keeps incorrect ones only, ``.inf`` correct ones only."""
    keep_per_prompt: Maybe[Limit] = None
    """keep at most this many rollouts of a prompt after balancing, in the same proportion. With more
    ``num_generations`` than this, what balancing drops is made up for."""
    margin: Choice[Literal["shift", "mask", "fixed", "none"]] = "shift"
    """what the margin does: "shift" the returns of correct and incorrect rollouts apart until their margin is
    ``margin_delta``; "mask" the rollouts that narrow it; "fixed": always ``margin_delta``, whatever the margin is (the
    control); or "none"."""
    margin_statistic: Choice[Literal["mean", "minmax"]] = "mean"
    """margin between "mean" returns, or "minmax": worst correct and best incorrect."""
    margin_scope: Choice[Literal["group", "global"]] = "group"
    """over each prompt's "group" or over the whole step ("global")."""
    margin_delta: Annotated[Real, Range(-1e6, 1e6)] = 0.4
    """the wanted margin, nats per token."""
    margin_direction: Choice[Literal["lift", "spread", "push_down"]] = "spread"
    """what moves: "lift" correct up, "push_down" incorrect down, "spread" both by half."""


Score = Choice[Literal["abs", "pos", "signed", "sq"]]
Part = Annotated[Real, Range(0, 1, open_low=True, remedy="it is a share in (0, 1]; selection: none keeps all")]


@settings
class CaMOPDConfig(Section):
    """CaMOPD (arXiv 2605.27115): recover general skills of a specialised student, keep the special one."""

    section = "camopd"

    domain: Listed[Text] = field(default_factory=list)
    """routing keys (``data_source``) of the special domain; all other prompts are general. The domain's teachers have
    these keys, the general teachers have none of them."""
    schedule: Choice[Literal["alternating", "mixed"]] = "alternating"
    """when each kind is trained: "alternating": ``n_general`` general steps, then one of the domain; "mixed": both in
    each step, ``n_general`` : 1."""
    n_general: Count = 3
    """general steps, or prompts, for one of the domain; see ``schedule``."""
    selection: Changeable[Choice[Literal["mass", "topk_frac", "random", "none"]]] = "mass"
    """rollouts to train on: "mass": those with the largest scores that together hold ``rho`` of the summed scores;
    "topk_frac": the ``rho`` with the largest scores; "random": as many as "mass" would take, any (the control); "none":
    all."""
    rho_g: Changeable[Part] = 0.8
    """share that ``selection`` takes of general rollouts."""
    rho_d: Changeable[Part] = 0.8
    """share that ``selection`` takes of the domain's rollouts."""
    score_g: Changeable[Score] = "abs"
    """score of a general rollout, mean over its tokens of the gap d = log q(y) - log p(y): "abs" |d|, "pos" max(d, 0),
    "signed" d, "sq" d * d."""
    score_d: Changeable[Score] = "pos"
    """score of a rollout of the domain; see ``score_g``."""
    r_g: Changeable[Positive] = 2.0
    """multiplies the loss of general rollouts."""
    r_d: Changeable[Positive] = 1.0
    """multiplies the loss of the domain's rollouts."""
    min_tokens: Changeable[CountOrNone] = 0
    """rollouts of fewer tokens are left out and counted."""
    diagnose_steps: Resumable[CountOrNone] = 0
    """every so many steps, measure how much the selected rollouts agree (against a random choice of the same size) and
    whether the branches' gradients oppose each other; 0 is never."""
    diagnose_samples: Resumable[
        Annotated[Integer, Range(2, 10**6, remedy="agreement needs at least 2, and at most 1e6")]
    ] = 32
    """rollouts that take part in each measurement."""
    diagnose_draws: Resumable[Annotated[Integer, Range(1, 10**6)]] = 20
    """random choices to compare with."""
    diagnose_dimensions: Resumable[Annotated[Integer, Range(1, 10**7)]] = 4096
    """of the random projection in which gradients are compared."""
