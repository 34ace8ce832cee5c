"""SAGE-OPD: selective turn intervention for agents (arXiv 2606.19659).

Every turn of the student gets a weight s_t = i_t * c_t. The intervention i_t is 1 where the environment
itself reports a failure or the turn has no end (section 3.3), else what the teacher says of the turn: SKIP 0,
WEAK alpha, STRONG 1 (equation 7). The confidence c_t is the mean over the turn's tokens of the teacher's largest
probability (equations 8 to 10), read off the distributions that the loss uses anyway. Z = N / sum_t s_t
|a_t| over the whole batch keeps the mean weight of a token at 1 (equations 11 and 12).

The paper's ablations are settings: ``sage.use_judge``, ``sage.use_confidence``, ``sage.normalization``; the
controls that it lacks are ``sage.intervention: random | inverted``, which move the weights between the turns
of a whole step (the shares of labels in the metrics are what the teacher said).
"""

from __future__ import annotations

import numpy as np

from opdengine.config.method_sections import SageConfig
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.environments.episodes import turns_of
from opdengine.errors import ConfigError
from opdengine.methods.checks import Check
from opdengine.methods.debate.contexts import contexts_of
from opdengine.methods.method import Method, need_teachers, route
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import OF_GAP, gap_of, need_reverse_kl, warn_of_sampling
from opdengine.methods.room import Need
from opdengine.methods.sage_judge import FAILED, Judge, Verdict, answer_metrics, judge_checks, turn_metrics
from opdengine.metrics import Mean
from opdengine.models.chat import written
from opdengine.types import Batch, Prompt, Sample, Turn

PAPER = Paper(
    arxiv="2606.19659",
    defaults={
        "divergence": ("reverse_kl", "equation 5"),
        "loss_normalization": ("token", "equation 12"),
        "num_generations": (1, "section 5.1"),
        "temperature": (0.4, "appendix A"),
        "top_p": (1.0, "appendix A"),
        "top_k": (0, "appendix A"),
        "environment.eval_temperatures": ([0.4], "appendix A"),
        "learning_rate": (1e-6, "appendix A"),
        "weight_decay": (0.1, "appendix A"),
    },
    choices={
        "environment.max_turns": "30, in search 16",
        "environment.stop": "none, in search </action>",
        "max_completion_length": "4096 of one turn",
        "prompts_per_step": "64",
        "max_steps": "one epoch: ALFWorld 55, ScienceWorld 56, search 156",
        "lr_scheduler_type": "unstated",
        "max_grad_norm": "unstated",
    },
)
"""The paper's judge, confidence and normalisation are the defaults of
:class:`opdengine.config.method_sections.SageConfig`."""


class SAGEOPD(Method):
    """Selective turn intervention; with several teachers for a prompt the first of them is the judge."""

    paper = PAPER

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        check(config)
        self.settings = config.sage
        self.contexts = contexts_of(config)
        self.judge = Judge(self.settings)
        self.teachers_per_prompt = 2 if config.debates else 1
        self.top1_temperature = self.settings.confidence_temperature
        self.needs = frozenset({"teacher_top1"} if self.settings.use_confidence else ())
        if self.settings.kl_mode == "sampled":
            self.needs |= OF_GAP
        self.diverges = self.settings.kl_mode != "sampled"

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which debates and verdicts can fail without an error."""
        return (*super().checks, *judge_checks(self.settings))

    def room(self, prompt: Prompt) -> list[Need]:
        """The tokens that the teachers read, and those of the judge's question."""
        needs = super().room(prompt)
        judge = route(self.teachers, prompt.key)[0]
        return [*needs, self.judge.need(prompt, judge)] if self.settings.use_judge else needs

    async def annotate(self, batch: Batch) -> None:
        """Set the intervention i_t as the weight of every turn."""
        await super().annotate(batch)
        turns = [(sample, *turn) for sample in batch for turn in turns_of(sample)]
        verdicts: list[Verdict | None] = [
            FAILED if self.settings.use_failures and has_failed(turn) else None for _, _, turn, _ in turns
        ]
        if self.settings.use_judge:
            asked = [place for place, verdict in enumerate(verdicts) if verdict is None]
            queries = [turns[place] for place in asked]
            judges = [route(self.teachers, sample.prompt.key)[0] for sample, *_ in queries]
            for place, verdict in zip(asked, await self.judge.ask(queries, judges), strict=True):
                verdicts[place] = verdict
            batch.metrics |= answer_metrics([v for place in asked if (v := verdicts[place])])
        final = [v or Verdict("strong", 1.0) for v in verdicts]
        for sample in batch:
            sample.turn_weight = np.zeros(len(sample.turns), dtype=np.float32)
        for (sample, index, _, _), verdict in zip(turns, final, strict=True):
            assert sample.turn_weight is not None
            sample.turn_weight[index] = verdict.weight
        places = [sum(t.role == "assistant" for t in sample.turns[:index]) for sample, index, _, _ in turns]
        batch.metrics |= turn_metrics(final, places)
        batch.records += [
            {"rollout_id": sample.id, "prompt_id": sample.prompt.id, "turn": place, "verdict": verdict.label,
             "weight": verdict.weight, "text": "\n".join(map(written, turn.messages)), "reply": verdict.reply}
            for (sample, _, turn, _), place, verdict in zip(turns, places, final, strict=True)
        ]  # fmt: skip

    def select(self, batch: Batch) -> None:
        """Give the weights of the step to other turns of it, where a control asks for that."""
        if self.settings.intervention != "judge":
            move_weights(batch, self.ranks, self.settings.intervention, self.config.seed)

    def weigh(self, batch: Batch) -> None:
        """kl_weight = Z s_t on every token of turn t (or that weight on its advantage; see ``sage.kl_mode``)."""
        super().weigh(batch)  # kl_weight is i_t now
        if self.settings.use_confidence:
            for sample in batch:
                assert sample.kl_weight is not None
                sample.kl_weight = sample.kl_weight * confidence(sample)
        factors = normalise(batch, self.ranks, self.settings)
        batch.metrics["sage/z"] = Mean(float(factors.mean()) if len(factors) else 0.0, len(factors))
        if self.settings.kl_mode == "sampled":
            for sample in batch:
                assert sample.kl_weight is not None
                sample.advantage = (sample.kl_weight * gap_of(sample)).astype(np.float32)
                sample.kl_weight = np.zeros_like(sample.kl_weight)


def check(config: TrainConfig) -> None:
    """Raise ConfigError for settings that SAGE-OPD cannot have."""
    need_teachers(config, 1)
    if not config.environment.name:
        raise ConfigError("method 'sage_opd' weighs the turns of an agent; set environment.name")
    if config.loss_normalization != "token":
        raise ConfigError(
            f"loss_normalization={config.loss_normalization!r} is not possible with method 'sage_opd', whose Z "
            "is a token mean; use 'token'"
        )
    sage = config.sage
    listed = [t.name for t in config.teachers if not t.judges_exactly]
    if sage.use_confidence and sage.confidence_temperature != 1.0 and listed:
        raise ConfigError(
            f"sage.confidence_temperature={sage.confidence_temperature} is not possible with the served teachers "
            f"{listed}, which tell their likeliest tokens at temperature 1 only; use 1.0, or local teachers"
        )
    if sage.kl_mode == "sampled":
        need_reverse_kl(config, "sage.kl_mode")
        warn_of_sampling(config, "sage.kl_mode=sampled", "take full_vocab")


def has_failed(turn: Turn) -> bool:
    """Whether no judge is needed: the environment reports a failure, or the turn is empty or was cut off."""
    is_empty = not any(written(message).strip() for message in turn.messages)
    return is_empty or bool(turn.info.get("failure")) or turn.info.get("stop_reason") == "length"


def confidence(sample: Sample) -> np.ndarray:
    """float32 [T]: c_t of each token's turn, the mean over its tokens of the teachers' largest probability."""
    if sample.teacher_top1 is None:  # no turn has weight: no teacher was asked
        return np.zeros(len(sample.target_ids), dtype=np.float32)
    mix = sample.token_mix(sample.teacher_top1.shape[1])
    per_token = (sample.teacher_top1 * mix / mix.sum(axis=1, keepdims=True)).sum(axis=1)
    turns = sample.target_turns
    counts = np.maximum(np.bincount(turns), 1)
    means: np.ndarray = (np.bincount(turns, weights=per_token) / counts).astype(np.float32)
    of_tokens: np.ndarray = means[turns]
    return of_tokens


def normalise(batch: Batch, ranks: Ranks, settings: SageConfig) -> np.ndarray:
    """Multiply the weights of every sample by Z = N / sum of weights (equations 11 and 12).

    All processes call this: with ``normalization_scope: batch`` N and the sum are those of the whole step.

    Args:
        batch: weighted samples.
        ranks: of the run.
        settings: what N counts, over what, and the bounds of Z.

    Returns:
        float64 [number of kept samples]: Z of each.
    """
    samples = list(batch)
    weights = [s.kl_weight for s in samples if s.kl_weight is not None]
    every = settings.normalization == "all_tokens"
    own = [(float(w.sum(dtype=np.float64)), float(len(w) if every else np.count_nonzero(w > 0))) for w in weights]
    step = ranks.join(own) if settings.normalization_scope == "batch" else []
    factors = np.array([normaliser(step or [row], settings) for row in own])
    for sample, weight, factor in zip(samples, weights, factors, strict=True):
        sample.kl_weight = (factor * weight).astype(np.float32)
    return factors


def normaliser(rows: list[tuple[float, float]], settings: SageConfig) -> float:
    """Z of samples given by (sum of weights, count): 1 where nothing is normalised, 0 where nothing has weight."""
    if settings.normalization == "none":
        return 1.0
    total, count = (sum(column) for column in zip(*rows, strict=True))
    if total == 0:
        return 0.0
    return float(min(count / max(total, settings.eps), settings.z_max or np.inf))


def move_weights(batch: Batch, ranks: Ranks, intervention: str, seed: int) -> None:
    """The turn weights of the step on other turns of it: shuffled, or the heaviest where the lightest were.

    All processes call this.

    Args:
        batch: annotated samples.
        ranks: of the run.
        intervention: "random" or "inverted".
        seed: of the order.
    """
    turns = [(sample, index) for sample in batch for index, *_ in turns_of(sample)]
    own = [0.0 if s.turn_weight is None else float(s.turn_weight[index]) for s, index in turns]
    given, mine = np.array(ranks.join(own)), ranks.own(len(own))
    order = np.random.default_rng([seed, batch.number]).permutation(len(given))
    if intervention == "random":
        received = given[order]
    else:
        ranked = order[np.argsort(given[order], kind="stable")]  # ties in random order
        received = np.empty_like(given)
        received[ranked] = given[ranked[::-1]]
    for (sample, index), weight in zip(turns, received[mine], strict=True):
        assert sample.turn_weight is not None
        sample.turn_weight[index] = weight
