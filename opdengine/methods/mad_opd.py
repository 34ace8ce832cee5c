"""MAD-OPD: multi-agent-debate on-policy distillation (arXiv 2605.01347).

K teachers debate the state for R rounds (section 4.1). Each then judges the student's own tokens
under prompt + transcript, which the student never sees (equation 8), weighted by the confidences of
the last round (equation 7): sum_k w_k D(p_Tk(. | s, H, y_<t), p_S(. | s, y_<t)).

``debate.use_transcript: false`` with ``debate.rounds: 1`` is the ablation that keeps the first-turn
confidences as weights and drops the transcript.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from opdengine.checks import Check
from opdengine.config import ConfigError, DebateConfig, TrainConfig
from opdengine.debate import Debate, Debater
from opdengine.debate_prompts import DebatePrompts, debate_prompts
from opdengine.methods.opd import PlainContexts, answer_need, need_teachers, plain_room, read_by
from opdengine.methods.paper import Paper
from opdengine.metrics import mean
from opdengine.recipe import Annotations, Annotator, Note, Recipe, distill, route
from opdengine.room import Need, Room, length
from opdengine.teachers import Teacher
from opdengine.types import Prompt, Rollout, SamplingParams

BASELINES = Paper(
    arxiv="2605.01347",
    defaults={
        "jsd_beta": (0.5, "remark 1"),
        "teacher_reduction": ("sum", "equation 8"),
        "divergence_temperature": (1.0, "released code"),
        "loss_normalization": ("sequence", "released code"),
        "num_generations": (1, "released code"),
        "temperature": (0.7, "released scripts"),
        "top_p": (0.8, "released scripts"),
        "top_k": (20, "released scripts"),
        "repetition_penalty": (1.2, "released scripts"),
        "learning_rate": (1e-5, "released scripts"),
        "lr_scheduler_type": ("cosine", "released scripts"),
        "warmup_ratio": (0.05, "released scripts"),
        "weight_decay": (0.01, "released scripts"),
        "adam_beta1": (0.9, "appendix B.1"),
        "adam_beta2": (0.999, "appendix B.1"),
        "max_grad_norm": (1.0, "appendix B.1"),
    },
    choices={
        "divergence": "reverse_kl for code, jsd for tool use: remark 1",
        "max_prompt_length": "4096 for code, 16384 for tool use",
        "max_completion_length": "16384 for code, 4096 for tool use",
        "prompts_per_step": "128",
        "max_steps": "one epoch: 234 for code, 125 for tool use",
    },
)
"""What all arms of the paper share."""

PAPER = replace(BASELINES, choices={**BASELINES.choices, "debate.prompts": "code, tools"})
"""Other settings of the debate are the defaults of :class:`opdengine.method_sections.DebateConfig`."""


class DebateContexts:
    """Debates every state, then puts the transcript into the teachers' contexts."""

    def __init__(self, config: DebateConfig, cache_dir: Path | None) -> None:
        self.config = config
        self._families: dict[str, DebatePrompts] = {}
        self.debater = Debater(
            rounds=config.rounds,
            params=SamplingParams(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                repetition_penalty=config.repetition_penalty,
                seed=config.seed,
            ),
            prompts_for=self.prompts_for,
            ask_confidence=config.use_confidence,
            cache_dir=cache_dir,
        )

    def prompts_for(self, key: str) -> DebatePrompts:
        """The prompt family for a routing key."""
        if key not in self._families:
            self._families[key] = debate_prompts(self.config.prompts_of(key))
        return self._families[key]

    async def annotate(self, rollouts: Sequence[Rollout], teachers: Sequence[Teacher]) -> Annotations:
        experts = [route(teachers, r.prompt.key) for r in rollouts]
        generated, cached, unreadable = self.debater.generated, self.debater.cached, self.debater.unreadable
        debates = await self.debater.debate([r.prompt for r in rollouts], experts)
        notes = [
            self.note(rollout, debate, routed)
            for rollout, debate, routed in zip(rollouts, debates, experts, strict=True)
        ]
        by_prompt = {r.prompt.id: d for r, d in zip(rollouts, debates, strict=True)}  # samples share theirs
        metrics = debate_metrics(list(by_prompt.values()), self.config.tau)
        metrics["debate/generated"] = self.debater.generated - generated
        metrics["debate/cached"] = self.debater.cached - cached
        metrics["debate/cache_unreadable"] = self.debater.unreadable - unreadable
        records = [
            {"prompt_id": prompt_id, "teachers": d.teachers, "rounds": d.rounds,
             "confidences": d.confidences, "weights": d.weights(self.config.tau).tolist(),
             "problems": d.problems, "failed": d.failed}
            for prompt_id, d in by_prompt.items()
        ]  # fmt: skip
        return Annotations(notes, metrics, records)

    def note(self, rollout: Rollout, debate: Debate, teachers: Sequence[Teacher]) -> Note:
        """Contexts and weights for one rollout."""
        if debate.failed:
            return Note(drop=debate.failed)
        prompt, family = rollout.prompt, self.prompts_for(rollout.prompt.key)
        contexts = []
        for k, teacher in enumerate(teachers):
            messages = prompt.messages
            if self.config.use_transcript:
                messages = tuple(family.score_messages(prompt.messages, k, debate.rounds))
            contexts.append(read_by(teacher, rollout, messages))
        return Note(contexts=tuple(contexts), mix=debate.weights(self.config.tau))


def debate_metrics(debates: Sequence[Debate], tau: float) -> dict[str, float]:
    """Problems by reason, mean confidence and weight per teacher, entropy of the weights (nats)."""
    problems: Counter[str] = Counter()
    confidences: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    entropies = []
    for debate in debates:
        problems.update(debate.problems)
        if debate.failed:
            continue
        mix = debate.weights(tau).astype(np.float64)
        entropies.append(float(-(mix * np.log(np.maximum(mix, 1e-30))).sum()))
        for name, stated, weight in zip(debate.teachers, debate.confidences, mix, strict=True):
            weights.setdefault(name, []).append(float(weight))
            if stated is not None:
                confidences.setdefault(name, []).append(stated)
    held = [d for d in debates if not d.failed]
    metrics = {f"debate/{reason}": float(count) for reason, count in problems.items()}
    metrics["debate/states"] = float(len(debates))
    metrics["debate/turns"] = float(sum(len(texts) for d in held for texts in d.rounds))
    metrics["debate/final_turns"] = float(sum(len(d.teachers) for d in held))
    known = [d.confidences for d in held if None not in d.confidences]
    metrics["debate/rated"] = float(len(known))
    metrics["debate/equal_confidences"] = float(sum(len(set(stated)) == 1 for stated in known))
    metrics["debate/parse_failures"] = float(problems["missing_confidence"])
    metrics["debate/failed"] = float(sum(bool(d.failed) for d in debates))
    if entropies:
        metrics["debate/weight_entropy"] = mean(entropies)
    for name, values in confidences.items():
        metrics[f"debate/confidence/{name}"] = mean(values)
    for name, values in weights.items():
        metrics[f"teacher_weight/{name}"] = mean(values)
    return metrics


DEBATES = "debates/step_{step}.jsonl"


def debate_checks(config: TrainConfig) -> tuple[Check, ...]:
    """What of a debate can come to nothing; empty where the teachers do not debate."""
    if not config.debates:
        return ()
    debate = config.debate
    states = (
        "debates did not take place (debate_too_long: the next turn might not fit a teacher's window; teacher_failure: "
        "every teacher's call failed), and their rollouts were dropped"
    )
    cut = f"turns of debates were cut off at debate.max_tokens={debate.max_tokens}"
    found = [
        Check("debate/failed", "debate/states", states, "lower debate.max_tokens or debate.rounds", DEBATES),
        Check(
            "debate/empty_turn",
            "debate/turns",
            "turns of debates are empty",
            "look at what the teachers write",
            DEBATES,
        ),
        Check("debate/truncated_turn", "debate/turns", cut, "raise debate.max_tokens", DEBATES),
    ]
    if debate.use_confidence:
        found += [
            Check(
                "debate/missing_confidence", "debate/final_turns", "confidences could not be read, and a debate that "
                "lacks one weighs its teachers alike (equation 7 does nothing)", "raise debate.max_tokens where turns "
                "are cut off, and see that debate.prompts asks for <<CONFIDENCE=N>>", DEBATES,
            ),
        ]  # fmt: skip
        if math.isfinite(debate.tau):
            found.append(
                Check(
                    "debate/equal_confidences", "debate/rated", "debates end with equal confidences, so their teachers "
                    "weigh alike (equation 7 does nothing)", "ask for confidences otherwise in debate.prompts", DEBATES,
                    share=1.0,
                )
            )  # fmt: skip
    return tuple(found)


def debate_room(config: TrainConfig, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
    """Every turn of a debate in which nobody has said anything yet, and the completion under its transcript."""
    debate = config.debate
    experts, needs = route(teachers, prompt.key), []
    if not prompt.messages:  # an environment has yet to write them
        turn = "a turn with debate.max_tokens"
        needs = [Need(t, debate.max_tokens, f"{turn}={debate.max_tokens}", "lower debate.max_tokens") for t in experts]
        return [*needs, *(answer_need(config, teacher, 0) for teacher in experts)]
    family = debate_prompts(debate.prompts_of(prompt.key))
    silent = [[""] * len(experts)] * debate.rounds
    for k, teacher in enumerate(experts):
        asked = [family.first_messages(prompt.messages, k, debate.use_confidence)]
        if debate.rounds > 1:
            asked.append(family.later_messages(prompt.messages, k, silent[1:], debate.use_confidence))
        before = max(length(teacher, messages, prompt.tools) for messages in asked)
        what = f"a debate's question of {before} tokens with debate.max_tokens={debate.max_tokens}"
        needs.append(Need(teacher, before + debate.max_tokens, what, "lower debate.max_tokens or debate.rounds"))
        read = family.score_messages(prompt.messages, k, silent) if debate.use_transcript else prompt.messages
        before = length(teacher, read, prompt.tools)
        needs.append(answer_need(config, teacher, before, "a prompt with its transcript"))
    return needs


def room_of(config: TrainConfig) -> Room:
    """What the contexts of :func:`contexts_of` ask of the teachers' windows."""
    return partial(debate_room if config.debates else plain_room, config)


def contexts_of(config: TrainConfig) -> Annotator:
    """Under what a method lets its teachers judge: the plain prompt, or a debate (``contexts: debate``)."""
    if config.contexts == "plain":
        return PlainContexts()
    need_teachers(config, 2)
    return debate_contexts(config)


def debate_contexts(config: TrainConfig) -> DebateContexts:
    """The debate of the configuration; a bad prompt family is an error now, not at the first debate."""
    debate = config.debate
    annotator = DebateContexts(debate, Path(debate.cache_dir or Path(config.output_dir) / "debate_cache"))
    if not isinstance(debate.prompts, Mapping) or "first" in debate.prompts:
        annotator.prompts_for("")
    else:
        for key in debate.prompts:
            annotator.prompts_for(key)
    return annotator


def mad_opd(config: TrainConfig) -> Recipe:
    """Debate among K >= 2 teachers, transcript in the teachers' contexts, confidence weights."""
    need_teachers(config, 2)
    debate = config.debate
    if not debate.use_transcript and not debate.use_confidence:
        raise ConfigError(
            "debate.use_transcript and debate.use_confidence are both off, so the debate would be "
            "generated and not used; turn one on or use method 'mt_opd'"
        )
    return Recipe(
        "mad_opd",
        debate_contexts(config),
        (distill,),
        teachers_per_prompt=2,
        checks=debate_checks(config),
        room=partial(debate_room, config),
    )
