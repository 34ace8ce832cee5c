"""What the tiny models can do, measured on held-out prompts with greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opdengine.methods.debate.prompts import parse_confidence
from tiny import task
from tiny.lessons import PROMPTS, spoken_answer, user_chat
from tiny.training import generate, hold_debates

ROUNDS = 2
_BEFORE = ("both right", "only this expert right", "only the peer right", "neither right")


def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict]) -> float:
    """Share of rows answered rightly in the plain chat."""
    chats = [user_chat(row["prompt"]) for row in rows]
    return _share(
        task.grade(text, row["answer"]) for text, row in zip(generate(model, tokenizer, chats), rows, strict=True)
    )


def measure_student(student: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, split: str, n: int) -> dict:
    """Accuracy in the plain chat for each skill."""
    return {skill: accuracy(student, tokenizer, task.prompts(split, skill, n)) for skill in task.SKILLS}


def measure_teachers(
    teachers: Sequence[Qwen3ForCausalLM], tokenizer: PreTrainedTokenizerFast, split: str, n: int
) -> list[dict]:
    """For each teacher and skill: accuracy in every chat, revisions and calibration."""
    results: list[dict] = [{} for _ in teachers]
    for skill in task.SKILLS:
        rows = task.prompts(split, skill, n)
        debates = hold_debates(teachers, tokenizer, rows, ROUNDS)
        right = [
            [[task.grade(spoken_answer(text), row["answer"]) for text in turn] for turn in debate]
            for debate, row in zip(debates, rows, strict=True)
        ]
        for expert, teacher in enumerate(teachers):
            scored = [
                PROMPTS.score_messages(user_chat(row["prompt"]), expert, debate)
                for row, debate in zip(rows, debates, strict=True)
            ]
            conclusions = generate(teacher, tokenizer, scored)
            results[expert][skill] = {
                "plain": accuracy(teacher, tokenizer, rows),
                "first_turn": _share(r[0][expert] for r in right),
                "after_debate": _share(r[-1][expert] for r in right),
                "scored_context": _share(
                    task.grade(text, row["answer"]) for text, row in zip(conclusions, rows, strict=True)
                ),
                "revisions": _revisions(right, expert),
                "first_turn_calibration": _calibration([d[0][expert] for d in debates], [r[0][expert] for r in right]),
                "last_turn_calibration": _calibration([d[-1][expert] for d in debates], [r[-1][expert] for r in right]),
            }
    return results


def _revisions(right: Sequence[Sequence[Sequence[float]]], expert: int) -> dict:
    """Share of last turns that are right, by who was right before."""
    groups: dict[str, list[float]] = {name: [] for name in _BEFORE}
    for turns in right:
        own, peer = turns[0][expert], turns[0][1 - expert]
        groups[_BEFORE[2 * (not own) + (not peer)]].append(turns[-1][expert])
    return {name: {"n": len(ends), "end_right": _share(ends)} for name, ends in groups.items() if ends}


def _calibration(texts: Sequence[str], right: Sequence[float]) -> dict:
    """Mean stated confidence when right and when wrong, and the expected calibration error."""
    stated = [
        (confidence / 100, r)
        for t, r in zip(texts, right, strict=True)
        if (confidence := parse_confidence(t)) is not None
    ]
    bins: dict[int, list[tuple[float, float]]] = {}
    for confidence, r in stated:
        bins.setdefault(min(9, int(10 * confidence)), []).append((confidence, r))
    gaps = [len(b) * abs(fmean(c for c, _ in b) - fmean(r for _, r in b)) for b in bins.values()]
    return {
        "missing": len(texts) - len(stated),
        "mean_if_right": _mean(c for c, r in stated if r),
        "mean_if_wrong": _mean(c for c, r in stated if not r),
        "expected_error": round(sum(gaps) / max(1, len(stated)), 3),
    }


def _share(values) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def _mean(values) -> float | None:
    values = list(values)
    return round(fmean(values), 3) if values else None
