"""Two skills and their combination: prompts, answers, splits, the verifier and the debate's words.

``convert``  ``M101100010001``          -> ``5421``        12 bits to 4 octal digits
``compile``  ``C(7+1)*0``               -> ``71+0*``       an expression to a stack program
``both``     ``M101100010001C(7+1)*0``  -> ``5421|71+0*``  both halves must be right

Programs are checked by executing them, so every program that computes the expression counts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

SKILLS = ("convert", "compile", "both")
SPLITS = ("train", "dev", "test")
BITS = 12
OPERATORS = "+-*"
SEPARATOR = "|"

DEBATE_PROMPTS = {
    "first": "{task}{confidence}",
    "later": "{task}\n{transcript}\nYou are Expert {expert}. Answer again.{confidence}",
    "score": "{task}\n{transcript}\nYou are Expert {expert}. Give the final answer.",
    "confidence": " How sure are you?",
}
"""A family for ``opdengine.methods.debate.prompts.debate_prompts``; the teachers were trained on it."""

# What a digit stands for while a program runs. Two programs that agree here agree for every
# operand: with the digits themselves, (2+2)*1 and 2+(2*1) would agree by accident.
_OPERAND_VALUES = (
    (1009, 2003, 3011, 4001, 5003, 6007, 7001, 8009, 9001, 10007),
    (10501, 9497, 8513, 7507, 6521, 5519, 4507, 3511, 2503, 1511),
)


def split_of(prompt: str) -> str | None:
    """The split that a prompt belongs to by its content.

    Args:
        prompt: a prompt of any skill.

    Returns:
        "train", "dev" or "test"; None for a combined prompt whose halves lie in different splits
        (no split contains it, so no half of a test prompt is ever seen in training).
    """
    halves = [half for half in _halves(prompt) if half]
    splits = {_split_of_half(half) for half in halves}
    return splits.pop() if len(splits) == 1 else None


def problem(skill: str, split: str, rng: random.Random) -> tuple[str, str]:
    """One random prompt of a split with its answer.

    Args:
        skill: "convert", "compile" or "both".
        split: "train", "dev" or "test".
        rng: the source of randomness.

    Raises:
        ValueError: the skill or the split is unknown.
    """
    if skill not in SKILLS:
        raise ValueError(f"unknown skill {skill!r}; choose one of {SKILLS}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {SPLITS}")
    if skill == "both":
        convert, digits = problem("convert", split, rng)
        compile_, program = problem("compile", split, rng)
        return convert + compile_, digits + SEPARATOR + program
    while True:
        prompt, answer = _convert(rng) if skill == "convert" else _compile(rng)
        if _split_of_half(prompt) == split:
            return prompt, answer


def prompts(split: str, skill: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` different prompts as rows of a data set.

    Args:
        split: "train", "dev" or "test".
        skill: "convert", "compile" or "both".
        n: how many.
        seed: which ones.

    Returns:
        Rows with ``id``, ``prompt``, ``answer`` and ``data_source`` (the skill).

    Raises:
        ValueError: the split does not hold that many different prompts.
    """
    rng = random.Random(f"{split}/{skill}/{seed}")
    found: dict[str, str] = {}
    repeats = 0
    while len(found) < n:
        prompt, answer = problem(skill, split, rng)
        repeats = repeats + 1 if prompt in found else 0
        if repeats == 200:
            raise ValueError(f"split {split!r} of {skill!r} holds about {len(found)} prompts, not {n}")
        found[prompt] = answer
    return [
        {"id": f"{split}/{prompt}", "prompt": prompt, "answer": answer, "data_source": skill}
        for prompt, answer in found.items()
    ]


def grade(text: str, answer: str) -> float:
    """1.0 if the text solves the problem that ``answer`` solves, else 0.0.

    Args:
        text: a completion, exactly as written: nothing is stripped or repaired.
        answer: the row's ``answer``.
    """
    given, wanted = text.split(SEPARATOR), answer.split(SEPARATOR)
    if len(given) != len(wanted):
        return 0.0
    return float(all(_half_is_right(g, w) for g, w in zip(given, wanted, strict=True)))


def verify(text: str, answer: Any, prompt_messages: Sequence[Mapping[str, Any]] = ()) -> float:
    """:func:`grade` in the form of a verifier: completion, the row's answer, the chat."""
    return grade(text, str(answer))


def _half_is_right(given: str, wanted: str) -> bool:
    if not set(wanted) & set(OPERATORS):
        return given == wanted
    if sorted(given) != sorted(wanted):
        return False
    return all(_run(given, values) == _run(wanted, values) for values in _OPERAND_VALUES)


def _run(program: str, values: Sequence[int]) -> int | None:
    """What a stack program leaves on the stack; None if it is not exactly one number."""
    stack: list[int] = []
    for symbol in program:
        if symbol in OPERATORS:
            if len(stack) < 2:
                return None
            right, left = stack.pop(), stack.pop()
            stack.append(left + right if symbol == "+" else left - right if symbol == "-" else left * right)
        elif symbol in "0123456789":
            stack.append(values[int(symbol)])
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def _convert(rng: random.Random) -> tuple[str, str]:
    number = rng.getrandbits(BITS)
    return f"M{number:0{BITS}b}", f"{number:0{BITS // 3}o}"


def _compile(rng: random.Random) -> tuple[str, str]:
    a, b, c = rng.sample("0123456789", 3)
    first, second = rng.choice(OPERATORS), rng.choice(OPERATORS)
    if rng.random() < 0.5:
        return f"C({a}{first}{b}){second}{c}", f"{a}{b}{first}{c}{second}"
    return f"C{a}{first}({b}{second}{c})", f"{a}{b}{c}{second}{first}"


def _halves(prompt: str) -> tuple[str, str]:
    convert, mark, compile_ = prompt.partition("C")
    return convert, mark + compile_


def _split_of_half(half: str) -> str:
    bucket = hashlib.sha256(half.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"
