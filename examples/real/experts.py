"""What the experts can do alone and after a debate, measured through the engine's own teachers and debates."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from opdengine.config.train import TrainConfig
from opdengine.methods.debate.contexts import DebateContexts
from opdengine.methods.debate.debate import Debate
from opdengine.methods.debate.prompts import CONFIDENCE_TAG, parse_confidence
from opdengine.teachers.local import LocalTeacher
from opdengine.training.evaluate import answer_params, wilson
from opdengine.types import Prompt, Request
from opdengine.verifiers.number import numeric


def grade(text: str, prompt: Prompt) -> float:
    """1 where the last number before the confidence is the answer, else 0."""
    return float(numeric(CONFIDENCE_TAG.sub("", text), prompt.answer, prompt.messages))


def share(right: Sequence[float]) -> dict[str, float]:
    """How many of how many are right, with Wilson's 95 % interval."""
    low, high = wilson(round(sum(right)), len(right))
    return {"accuracy": float(np.mean(right)), "low": low, "high": high, "n": len(right)}


def measure(config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Grade the teachers of a run by skill.

    Args:
        config: of a run with a debate; its teachers are loaded here, one copy each.
        rows: questions as in :func:`real.market.questions`.

    Returns:
        ``alone``: expert -> skill -> share, asked as the student is. ``rounds``: a list by round of the same, in
        debates. ``neither``: skill -> share of the debates whose answer in the end neither first turn holds.
        ``confidences``: rounds, then skill -> expert -> mean stated confidence of right and of wrong turns.
        ``judging``: expert -> skill -> share, greedy under the whole transcript. ``debates``: what was said.
    """
    prompts = [Prompt(r["id"], tuple(r["messages"]), answer=r["answer"], key=r["data_source"]) for r in rows]
    skills = list(dict.fromkeys(p.key for p in prompts))
    teachers = [LocalTeacher(t) for t in config.teachers]
    contexts = DebateContexts(config.debate, None, config.max_completion_length)
    with torch.no_grad():
        plain = [[Request(p.id, tuple(t.encode(p.messages, ())), 0) for p in prompts] for t in teachers]
        alone = asyncio.run(_all(teachers, plain, config))
        debates = asyncio.run(contexts.debater.debate(prompts, [teachers] * len(prompts)))
        families = [contexts.prompts_for(p.key) for p in prompts]
        asked = [
            [
                Request(p.id, tuple(t.encode(family.score_messages(p.messages, k, d.rounds), ())), 0)
                for p, d, family in zip(prompts, debates, families, strict=True)
            ]
            for k, t in enumerate(teachers)
        ]
        judging = asyncio.run(_all(teachers, asked, config))
    names = [t.name for t in teachers]

    def graded(texts: Sequence[str]) -> dict[str, dict[str, float]]:
        right = [grade(text, p) for text, p in zip(texts, prompts, strict=True)]
        return {s: share([r for r, p in zip(right, prompts, strict=True) if p.key == s]) for s in skills}

    rounds = range(config.debate.rounds)
    said = [[[d.rounds[r][k] for d in debates] for k in range(len(teachers))] for r in rounds]
    return {
        "alone": {name: graded(texts) for name, texts in zip(names, alone, strict=True)},
        "rounds": [{name: graded(said[r][k]) for k, name in enumerate(names)} for r in rounds],
        "judging": {name: graded(texts) for name, texts in zip(names, judging, strict=True)},
        "neither": {
            s: share([_new(d, p) for d, p in zip(debates, prompts, strict=True) if p.key == s]) for s in skills
        },
        "confidences": [
            {s: {name: _stated([(d.rounds[r][k], p) for d, p in zip(debates, prompts, strict=True) if p.key == s])
                 for k, name in enumerate(names)} for s in skills}
            for r in rounds
        ],
        "debates": [{"question": p.messages[-1]["content"], "answer": p.answer,
                     "new": bool(_new(d, p)), "rounds": d.rounds,
                     "confidences": d.confidences, "weights": d.weights(config.debate.tau).tolist()}
                    for d, p in zip(debates, prompts, strict=True)],
    }  # fmt: skip


async def _all(
    teachers: Sequence[LocalTeacher], asked: Sequence[Sequence[Request]], config: TrainConfig
) -> list[list[str]]:
    found = []
    for teacher, requests in zip(teachers, asked, strict=True):
        answers = await teacher.generate(requests, answer_params(config))
        found.append([answer.text for answer in answers])
    return found


def _new(debate: Debate, prompt: Prompt) -> float:
    """1 where a last turn is right and no first turn was."""
    right = [max(grade(text, prompt) for text in turn) for turn in debate.rounds]
    return float(right[-1] and not right[0])


def _stated(turns: Sequence[tuple[str, Prompt]]) -> dict[str, float | None]:
    found: dict[float, list[float]] = {1.0: [], 0.0: []}
    for text, prompt in turns:
        confidence = parse_confidence(text)
        if confidence is not None:
            found[grade(text, prompt)].append(confidence)
    return {
        name: float(np.mean(found[right])) if found[right] else None for name, right in (("right", 1.0), ("wrong", 0.0))
    }
