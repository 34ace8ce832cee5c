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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opdengine.chat import written
from opdengine.config import ConfigError, SageConfig, TrainConfig
from opdengine.judge import FAILED, Judge, Verdict, answer_metrics, judge_checks, turn_metrics
from opdengine.methods.advantage import MEASURES, gaps, need_reverse_kl
from opdengine.methods.mad_opd import contexts_of, debate_checks, room_of
from opdengine.methods.opd import need_teachers
from opdengine.methods.paper import Paper
from opdengine.recipe import Annotations, Annotator, Batch, Note, Recipe, Stats, Weighed, plain_signal, route
from opdengine.rollout.episodes import turns_of
from opdengine.room import Need
from opdengine.teachers import Teacher
from opdengine.types import Prompt, Rollout, TokenSignal, Turn

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
"""Those of judge, confidence and normalisation are the defaults of :class:`opdengine.method_sections.SageConfig`."""


class Intervention:
    """Turn weights i_t for every rollout, over the contexts of another annotator."""

    def __init__(self, config: SageConfig, contexts: Annotator) -> None:
        self.config = config
        self.contexts = contexts
        self.judge = Judge(config)

    async def annotate(self, rollouts: Sequence[Rollout], teachers: Sequence[Teacher]) -> Annotations:
        found = await self.contexts.annotate(rollouts, teachers)
        turns = [(i, t) for i, r in enumerate(rollouts) if not found.notes[i].drop for t in turns_of(r)]
        verdicts: list[Verdict | None] = [
            FAILED if self.config.use_failures and has_failed(turn) else None for _, (_, turn, _) in turns
        ]
        metrics = dict(found.metrics)
        if self.config.use_judge:
            asked = [place for place, verdict in enumerate(verdicts) if verdict is None]
            queries = [(rollouts[i], *turn) for i, turn in (turns[place] for place in asked)]
            judges = [route(teachers, rollout.prompt.key)[0] for rollout, *_ in queries]
            for place, verdict in zip(asked, await self.judge.ask(queries, judges), strict=True):
                verdicts[place] = verdict
            metrics |= answer_metrics([v for place in asked if (v := verdicts[place])])
        final = [v or Verdict("strong", 1.0) for v in verdicts]
        weights = [np.zeros(len(r.turns), dtype=np.float32) for r in rollouts]
        for (i, (index, _, _)), verdict in zip(turns, final, strict=True):
            weights[i][index] = verdict.weight
        notes = [
            note if note.drop else Note(note.contexts, note.mix, weight)
            for note, weight in zip(found.notes, weights, strict=True)
        ]
        places = [sum(t.role == "assistant" for t in rollouts[i].turns[:index]) for i, (index, _, _) in turns]
        records = [
            {"rollout_id": rollouts[i].id, "prompt_id": rollouts[i].prompt.id, "turn": place, "verdict": verdict.label,
             "weight": verdict.weight, "text": "\n".join(map(written, turn.messages)), "reply": verdict.reply}
            for (i, (_, turn, _)), place, verdict in zip(turns, places, final, strict=True)
        ]  # fmt: skip
        return Annotations(notes, {**metrics, **turn_metrics(final, places)}, [*found.records, *records])


@dataclass(frozen=True)
class Control:
    """The weights of a step on other turns of it: shuffled, or the heaviest where the lightest were.

    Args:
        intervention: "random" or "inverted".
        seed: of the order.
    """

    intervention: str
    seed: int

    def __call__(
        self, rollouts: Sequence[Rollout], notes: Sequence[Note], step: int
    ) -> tuple[list[Note], Mapping[str, float]]:
        moved = {i: np.array(note.turn_weight) for i, note in enumerate(notes) if not note.drop}
        turns = [(i, index) for i in moved for index, *_ in turns_of(rollouts[i])]
        given = np.array([moved[i][index] for i, index in turns])
        order = np.random.default_rng([self.seed, step]).permutation(len(turns))
        if self.intervention == "random":
            received = given[order]
        else:
            ranked = order[np.argsort(given[order], kind="stable")]  # ties in random order
            received = np.empty_like(given)
            received[ranked] = given[ranked[::-1]]
        for (i, index), weight in zip(turns, received, strict=True):
            moved[i][index] = weight
        return [replace(note, turn_weight=moved[i]) if i in moved else note for i, note in enumerate(notes)], {}


def has_failed(turn: Turn) -> bool:
    """Whether no judge is needed: the environment reports a failure, or the turn is empty or was cut off."""
    is_empty = not any(written(message).strip() for message in turn.messages)
    return is_empty or bool(turn.info.get("failure")) or turn.info.get("stop_reason") == "length"


class Selective:
    """kl_weight = Z s_t on every token of turn t (or that weight on its advantage; see ``sage.kl_mode``)."""

    def __init__(self, config: SageConfig) -> None:
        self.config = config

    def __call__(self, batch: Batch) -> Weighed:
        signals = [plain_signal(r, n) for r, n in zip(batch.rollouts, batch.notes, strict=True)]
        if self.config.use_confidence:
            signals = [
                TokenSignal(signal.kl_weight * confidence(rollout, note, stats), signal.mix)
                for signal, rollout, note, stats in zip(signals, batch.rollouts, batch.notes, batch.stats, strict=True)
            ]
        scopes = [list(range(len(signals)))]
        if self.config.normalization_scope == "trajectory":
            scopes = [[i] for i in range(len(signals))]
        factors = np.ones(len(signals))
        for scope in scopes:
            factors[scope] = self.factor([signals[i].kl_weight for i in scope])
        scaled = [
            TokenSignal((factor * s.kl_weight).astype(np.float32), s.mix)
            for factor, s in zip(factors, signals, strict=True)
        ]
        if self.config.kl_mode == "sampled":
            scaled = [sampled(signal, gap) for signal, gap in zip(scaled, gaps(batch), strict=True)]
        return Weighed(scaled, {"sage/z": float(factors.mean()) if len(factors) else 0.0})

    def factor(self, weights: Sequence[np.ndarray]) -> float:
        """Z over some rollouts: 1 where nothing is normalised, 0 where no token has weight."""
        if self.config.normalization == "none":
            return 1.0
        total = sum(float(w.sum(dtype=np.float64)) for w in weights)
        if total == 0:
            return 0.0
        all_tokens = self.config.normalization == "all_tokens"
        count = sum(len(w) if all_tokens else int((w > 0).sum()) for w in weights)
        return min(count / max(total, self.config.eps), self.config.z_max or np.inf)


def sampled(signal: TokenSignal, gap: np.ndarray) -> TokenSignal:
    """The same weights on the sampled tokens' policy gradient, whose advantage is the gap [T], for the divergence."""
    return TokenSignal(np.zeros_like(signal.kl_weight), signal.mix, (signal.kl_weight * gap).astype(np.float32))


def confidence(rollout: Rollout, note: Note, stats: Stats) -> np.ndarray:
    """float32 [T]: c_t of each token's turn, the mean over its tokens of the teachers' largest probability."""
    if stats.teacher_top1 is None:  # no turn has weight: no teacher was asked
        return np.zeros(len(rollout.targets), dtype=np.float32)
    top1 = stats.teacher_top1.astype(np.float64)
    mix = np.full(top1.shape[1], 1 / top1.shape[1]) if note.mix is None else note.mix / note.mix.sum()
    turns, per_token = rollout.target_turns, top1 @ mix
    counts = np.maximum(np.bincount(turns), 1)
    means: np.ndarray = np.bincount(turns, weights=per_token) / counts
    return means[turns].astype(np.float32)


def sage_opd(config: TrainConfig) -> Recipe:
    """Selective turn intervention; with several teachers for a prompt the first of them is the judge."""
    need_teachers(config, 1)
    if not config.environment.name:
        raise ConfigError("method 'sage_opd' weighs the turns of an agent; set environment.name")
    if config.loss_normalization != "token":
        raise ConfigError(
            f"loss_normalization={config.loss_normalization!r} is not possible with method 'sage_opd', whose Z "
            "is a token mean; use 'token'"
        )
    sage = config.sage
    listed = [t.name for t in config.teachers if t.base_url is not None]
    if sage.use_confidence and sage.confidence_temperature != 1.0 and listed:
        raise ConfigError(
            f"sage.confidence_temperature={sage.confidence_temperature} is not possible with the served teachers "
            f"{listed}, which tell their likeliest tokens at temperature 1 only; use 1.0, or local teachers"
        )
    measures: tuple[str, ...] = ("teacher_top1",) if sage.use_confidence else ()
    if sage.kl_mode == "sampled":
        need_reverse_kl(config, "sage.kl_mode")
        measures += MEASURES
    intervention = Intervention(sage, contexts_of(config))

    def room(prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
        needs = list(room_of(config)(prompt, teachers))
        return [*needs, intervention.judge.need(prompt, route(teachers, prompt.key)[0])] if sage.use_judge else needs

    return Recipe(
        "sage_opd",
        intervention,
        (Selective(sage),),
        teachers_per_prompt=2 if config.debates else 1,
        measures=measures,
        top1_temperature=sage.confidence_temperature,
        checks=(*debate_checks(config), *judge_checks(sage)),
        room=room,
        revise=None if sage.intervention == "judge" else Control(sage.intervention, config.seed),
    )
