"""A teacher as gatekeeper: does a turn of the student deserve supervision? (SAGE-OPD, section 3.3)"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opdengine.config.method_sections import SageConfig
from opdengine.methods.checks import Check
from opdengine.methods.room import Need, length
from opdengine.metrics import Mean, mean
from opdengine.models.chat import written
from opdengine.models.thoughts import without_thoughts
from opdengine.teachers import Teacher
from opdengine.types import Completion, Failure, Message, Prompt, Request, Sample, SamplingParams, Turn

LABELS = ("skip", "weak", "strong")

VERDICTS = "verdicts/step_{step}.jsonl"

TURN_BIN = 5
"""Turns per bin of the shares by turn."""

SYSTEM = """You decide where a smaller agent needs teaching. It acts step by step in a text environment; you see \
one action that it proposes and say whether that action should be corrected."""

QUESTION = """Task ({task_type}): {task_goal}
Where it began: {scene_description}
{history}What the agent sees: {last_obs}
Possible actions (at most {admissible_count} shown): {admissible}
What the agent wrote: {llm_text}
{next_obs}
Choose one word.
SKIP: a sensible action, as good as yours would be, or a case too unclear to correct with confidence.
WEAK: maybe not the best action, but you are not sure or it matters little.
STRONG: clearly wrong, off the task, repeated without need, or likely to make the task fail.
Reply with SKIP, WEAK or STRONG and nothing else."""

Query = tuple[Sample, int, Turn, tuple[Message, ...]]
"""A sample, the index of one of its turns, the turn, and the chat before it."""


@dataclass(frozen=True)
class Verdict:
    """The decision about one turn.

    Args:
        label: "skip", "weak", "strong", "det_fail" (without asking), or why no answer could be used:
            "unparsed", "judge_failed", "judge_window".
        weight: i_t.
        reply: what the judge wrote.
    """

    label: str
    weight: float
    reply: str = field(default="", compare=False)


FAILED = Verdict("det_fail", 1.0)


class Judge:
    """Asks teachers about turns, all at once."""

    def __init__(self, config: SageConfig) -> None:
        self.config = config
        self.params = SamplingParams(max_tokens=config.judge_max_tokens, temperature=config.judge_temperature)

    async def ask(self, queries: Sequence[Query], judges: Sequence[Teacher]) -> list[Verdict]:
        """One verdict per query, each from its own judge."""
        fallback = self.config.judge_fallback
        verdicts = [Verdict("judge_window", fallback)] * len(queries)

        async def ask_one(teacher: Teacher) -> None:
            asked = []
            for place, (query, judge) in enumerate(zip(queries, judges, strict=True)):
                if judge is teacher:
                    ids = tuple(teacher.encode(self.messages(query)))
                    if teacher.window is None or len(ids) + self.params.max_tokens <= teacher.window:
                        asked.append((place, Request(f"judge {query[0].id} turn {query[1]}", ids, _seed(query))))
            replies = await teacher.generate([request for _, request in asked], self.params) if asked else []
            for (place, _), reply in zip(asked, replies, strict=True):
                verdicts[place] = self.read(reply, teacher.opening)

        await asyncio.gather(*(ask_one(t) for t in {id(j): j for j in judges}.values()))
        return verdicts

    def need(self, prompt: Prompt, judge: Teacher) -> Need:
        """Room for the shortest question: about an empty turn, before which nothing has happened."""
        turn = Turn("assistant", np.zeros(0, dtype=np.int64))
        sample = Sample("", prompt, (Turn("prompt", np.zeros(0, dtype=np.int64)), turn))
        before = length(judge, self.messages((sample, 1, turn, prompt.messages)))
        count = self.params.max_tokens
        what = f"the judge's question of {before} tokens with sage.judge_max_tokens={count}"
        return Need(judge, before + count, what, "lower sage.judge_max_tokens")

    def messages(self, query: Query) -> list[Message]:
        """The question about one turn: the state before it and what the student wrote."""
        sample, index, turn, chat = query
        before = _info_before(sample, index)
        shown = list(before.get("admissible") or ())[: self.config.admissible_count]
        following = sample.turns[index + 1].messages if index + 1 < len(sample.turns) else ()
        next_obs = turn.info.get("observation") or _text(following)
        fields = {
            "task_type": sample.prompt.key or "task",
            "task_goal": str(sample.info.get("goal") or _text(sample.prompt.messages[-1:])),
            "scene_description": str(sample.info.get("observation") or _text(sample.prompt.messages[-1:])),
            "last_obs": str(before.get("observation") or _text(chat[-1:])),
            "admissible": ", ".join(map(str, shown)) or "not listed",
            "admissible_count": self.config.admissible_count,
            "llm_text": _text(turn.messages),
            "history": f"So far:\n{_history(sample, chat)}\n" if self.config.judge_history else "",
            "next_obs": f"What happened: {next_obs}" if self.config.judge_next_observation else "",
        }
        question = (self.config.judge_prompt or QUESTION).format(**fields)
        system = SYSTEM if self.config.judge_prompt is None else ""
        return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]

    def read(self, reply: Completion | Failure, opening: str = "") -> Verdict:
        """The verdict of a reply; anything but exactly one of the words falls back to full supervision.

        Args:
            reply: of the judge.
            opening: the thought that the judge's prompt leaves open, see :attr:`opdengine.teachers.Teacher.opening`.
        """
        if isinstance(reply, Failure):
            return Verdict("judge_failed", self.config.judge_fallback)
        text = (
            without_thoughts(opening + reply.text) or ""
        )  # what a judge weighs in a thought without an end is no verdict
        found = set(re.findall(r"\b(SKIP|WEAK|STRONG)\b", text.upper()))
        if len(found) != 1:
            return Verdict("unparsed", self.config.judge_fallback, reply.text)
        label = found.pop().lower()
        return Verdict(label, {"skip": 0.0, "weak": self.config.alpha, "strong": 1.0}[label], reply.text)


def answer_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Count the turns that the judge was asked about, and those without a verdict by reason."""
    lost = Counter(v.label for v in verdicts if v.label not in LABELS)
    return {"sage/asked": float(len(verdicts)), **{f"sage/unanswered/{label}": float(n) for label, n in lost.items()}}


def judge_checks(config: SageConfig) -> tuple[Check, ...]:
    """The run warns where many turns have no verdict: they weigh ``judge_fallback``, which makes it another method."""
    asked, fallback = "sage/asked", f"and weigh sage.judge_fallback={config.judge_fallback}"
    return (
        Check(
            "sage/unanswered/judge_window", asked, f"turns do not fit the judge's window with sage.judge_max_tokens="
            f"{config.judge_max_tokens} {fallback}", "lower sage.judge_max_tokens (a verdict is one word; a judge "
            "that thinks writes more), sage.admissible_count, or switch sage.judge_history off", VERDICTS,
        ),
        Check(
            "sage/unanswered/unparsed", asked, f"replies of the judge hold no single verdict {fallback}",
            "see what it writes, raise sage.judge_max_tokens where it is cut off, or change sage.judge_prompt",
            VERDICTS,
        ),
        Check(
            "sage/unanswered/judge_failed", asked, f"calls of the judge failed; their turns have no verdict {fallback}",
            "look at the teacher's server (teacher_failures/... in metrics.jsonl names the reasons)", VERDICTS,
        ),
        Check(
            "sage/turns_without_weight", "sage/turns", "turns were judged SKIP or weigh 0, so nothing is trained on",
            "see what the judge writes, or change sage.judge_prompt", VERDICTS, share=1.0,
        ),
    )  # fmt: skip


def turn_metrics(verdicts: Sequence[Verdict], places: Sequence[int]) -> dict[str, float]:
    """Shares of the labels, of all turns and by turn of the episode, and the mean intervention.

    Args:
        verdicts: one per turn.
        places: which turn of its episode each is, from 0.
    """
    if not verdicts:
        return {}
    shares = Counter(v.label for v in verdicts)
    labels = (*LABELS, "det_fail", *sorted(set(shares) - {*LABELS, "det_fail"}))
    count = len(verdicts)
    metrics: dict[str, float] = {f"sage/{label}": Mean(shares[label] / count, count) for label in labels}
    metrics["sage/turns"] = float(count)
    metrics["sage/turns_without_weight"] = float(sum(v.weight == 0 for v in verdicts))
    metrics["sage/intervention"] = mean([v.weight for v in verdicts])
    bins = [place // TURN_BIN for place in places]
    for number in sorted(set(bins)):
        members = [v.label for v, b in zip(verdicts, bins, strict=True) if b == number]
        name = f"turns_{number * TURN_BIN}-{number * TURN_BIN + TURN_BIN - 1}"
        for label in (*LABELS, "det_fail"):
            metrics[f"sage/{label}/{name}"] = mean([member == label for member in members])
    return metrics


def _info_before(sample: Sample, index: int) -> Mapping[str, Any]:
    """Return what the environment reported last before a turn."""
    earlier = [t.info for t in sample.turns[:index] if t.role == "assistant"]
    return earlier[-1] if earlier else sample.info


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(map(written, messages))


def _history(sample: Sample, chat: Sequence[Message]) -> str:
    since = chat[len(sample.prompt.messages) :]
    lines = [f"{'agent' if m['role'] == 'assistant' else 'environment'}: {written(m)}" for m in since]
    return "\n".join(lines) or "nothing yet"


def _seed(query: Query) -> int:
    """Return the seed of the judge's sampling: another one for every turn of every step."""
    sample, index, *_ = query
    return zlib.crc32(f"{sample.policy_version}:{sample.id}:{index}".encode())
