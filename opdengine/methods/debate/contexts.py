"""Teachers debate every state and judge the student under the transcript (MAD-OPD, equations 7 and 8)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from opdengine.config.method_sections import DebateConfig
from opdengine.config.train import TrainConfig
from opdengine.methods.checks import Check
from opdengine.methods.debate.debate import Debate, Debater
from opdengine.methods.debate.prompts import DebatePrompts, debate_prompts
from opdengine.methods.method import Contexts, PlainContexts, answer_need, need_teachers, read_by, route
from opdengine.methods.privileged import Privileged
from opdengine.methods.room import Need, length
from opdengine.metrics import mean
from opdengine.teachers import Teacher
from opdengine.types import Batch, Prompt, Sample, SamplingParams


class DebateContexts:
    """Debates every state, then puts the transcript into the teachers' contexts.

    Args:
        config: of the debate.
        cache_dir: folder of finished debates, or None for no cache.
        longest: most tokens of a completion (``max_completion_length``).
        view: a prompt as the teachers read it.
    """

    def __init__(
        self, config: DebateConfig, cache_dir: Path | None, longest: int = 0, view: Privileged | None = None
    ) -> None:
        self.config = config
        self.longest = longest
        self.view = view or Privileged(None)
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

    async def __call__(self, batch: Batch, teachers: Sequence[Teacher]) -> None:
        samples = list(batch)
        experts = [route(teachers, s.prompt.key) for s in samples]
        generated, cached, unreadable = self.debater.generated, self.debater.cached, self.debater.unreadable
        debates = await self.debater.debate([self.view(s.prompt) for s in samples], experts)
        for sample, debate, routed in zip(samples, debates, experts, strict=True):
            self.judged_after(sample, debate, routed)
        by_prompt = {s.prompt.id: d for s, d in zip(samples, debates, strict=True)}  # samples share theirs
        batch.metrics |= debate_metrics(list(by_prompt.values()), self.config.tau)
        batch.metrics["debate/generated"] = self.debater.generated - generated
        batch.metrics["debate/cached"] = self.debater.cached - cached
        batch.metrics["debate/cache_unreadable"] = self.debater.unreadable - unreadable
        batch.records += [
            {"prompt_id": prompt_id, "teachers": d.teachers, "rounds": d.rounds,
             "confidences": d.confidences, "weights": d.weights(self.config.tau).tolist(),
             "problems": d.problems, "failed": d.failed}
            for prompt_id, d in by_prompt.items()
        ]  # fmt: skip

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which a debate can fail without an error."""
        return debate_checks(self.config)

    def room(self, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
        """Every turn of a debate in which nobody has said anything yet, and the completion under its transcript."""
        debate, prompt = self.config, self.view(prompt)
        experts, needs = route(teachers, prompt.key), []
        if not prompt.messages:  # an environment has yet to write them
            turn = "a turn with debate.max_tokens"
            needs = [
                Need(t, debate.max_tokens, f"{turn}={debate.max_tokens}", "lower debate.max_tokens") for t in experts
            ]
            return [*needs, *(answer_need(self.longest, teacher, 0) for teacher in experts)]
        family = self.prompts_for(prompt.key)
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
            needs.append(answer_need(self.longest, teacher, before, "a prompt with its transcript"))
        return needs

    def judged_after(self, sample: Sample, debate: Debate, teachers: Sequence[Teacher]) -> None:
        """Contexts and weights of one sample."""
        if debate.failed:
            sample.drop = debate.failed
            return
        prompt, family = self.view(sample.prompt), self.prompts_for(sample.prompt.key)
        contexts = []
        for k, teacher in enumerate(teachers):
            messages = prompt.messages
            if self.config.use_transcript:
                messages = tuple(family.score_messages(prompt.messages, k, debate.rounds))
            contexts.append(read_by(teacher, sample, messages))
        sample.contexts, sample.mix = tuple(contexts), debate.weights(self.config.tau)


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


def debate_checks(debate: DebateConfig) -> tuple[Check, ...]:
    """The ways in which a debate can fail without an error."""
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


def contexts_of(config: TrainConfig) -> Contexts:
    """Return the contexts that a configuration names: the plain prompt, or a debate (``contexts: debate``)."""
    if config.contexts == "plain":
        return PlainContexts(config)
    need_teachers(config, 2)
    return debate_contexts(config)


def debate_contexts(config: TrainConfig) -> DebateContexts:
    """Return the debate of a configuration. A bad prompt family is an error now, not at the first debate."""
    debate = config.debate
    contexts = DebateContexts(
        debate,
        Path(debate.cache_dir or Path(config.output_dir) / "debate_cache"),
        config.max_completion_length,
        Privileged(config.teacher_prompt_template),
    )
    if not isinstance(debate.prompts, Mapping) or "first" in debate.prompts:
        contexts.prompts_for("")
    else:
        for key in debate.prompts:
            contexts.prompts_for(key)
    return contexts
