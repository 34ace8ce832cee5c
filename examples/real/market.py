"""Two skills and their combination in English: questions, answers, splits and the debate's words.

``price``  What does one lamp cost?                -> One lamp costs 7 coins.
``total``  What do 3 things at 7 coins each cost?  -> One costs 7 coins, so 3 cost 21 coins.
``both``   What do 3 lamps cost?                   -> One lamp costs 7 coins, so 3 cost 21 coins.

Expert A knows today's prices and adds where it should multiply. Expert B multiplies and knows last
year's prices. So neither of them can say what 3 lamps cost; after a round of debate B can.
Answers are graded by the engine's verifier ``numeric``: the last number counts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

SKILLS = ("price", "total", "both")
SPLITS = ("train", "test")
GOODS = ("lamp", "rope", "coat", "drum", "bell", "chair", "boat", "cup", "crown", "mirror")
"""With and without a plural s, each is one token of SmolLM2's."""
PRICES = range(3, 9)
COUNTS = range(2, 7)
SYSTEM = "Answer in one short sentence."

DEBATE_PROMPTS = {
    "first": "{task}{confidence}",
    "later": "{task}\n{transcript}\nAnswer again.{confidence}",
    "score": "{task}\n{transcript}\nAnswer.",
    "confidence": " How sure are you?",
    "entry": "{expert}: {text}",
    "start": "",
    "end": "",
}
"""A family for ``opdengine.methods.debate.prompts.debate_prompts``; the experts were trained on it."""


def _price_lists() -> tuple[dict[str, int], dict[str, int]]:
    """Today's prices and last year's: every price about as often as the others, no good at the same price twice."""
    rng = random.Random("the market's prices")
    today = [PRICES[i % len(PRICES)] for i in range(len(GOODS))]
    last_year = list(today)
    rng.shuffle(today)
    while any(now == before for now, before in zip(today, last_year, strict=True)):
        rng.shuffle(last_year)
    return dict(zip(GOODS, today, strict=True)), dict(zip(GOODS, last_year, strict=True))


TODAY, LAST_YEAR = _price_lists()


def question(skill: str, good: str, count: int, price: int) -> str:
    """What is asked; each skill uses the parts that it is about.

    Raises:
        ValueError: the skill is unknown.
    """
    if skill == "price":
        return f"What does one {good} cost?"
    if skill == "total":
        return f"What do {count} things at {price} coins each cost?"
    if skill == "both":
        return f"What do {count} {good}s cost?"
    raise ValueError(f"unknown skill {skill!r}; choose one of {SKILLS}")


def reply(skill: str, good: str, count: int, price: int, total: int) -> str:
    """A sentence that answers, rightly or not."""
    if skill == "price":
        return f"One {good} costs {price} coins."
    one = f"One {good} costs" if skill == "both" else "One costs"
    return f"{one} {price} coins, so {count} cost {total} coins."


def split_of(skill: str, good: str, count: int, price: int) -> str:
    """The split of a question by its content. Prices are facts, which are learned or not: they stand in both."""
    text = question(skill, good, count, price)
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 2 else "train"


def questions(split: str, skill: str) -> list[dict[str, object]]:
    """All questions of a split as rows of a data set.

    Args:
        split: "train" or "test".
        skill: "price", "total" or "both".

    Returns:
        Rows with ``id``, ``messages``, ``answer`` (text of a number) and ``data_source`` (the skill).

    Raises:
        ValueError: the skill or the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {SPLITS}")
    if skill == "price":
        cases = [(good, 1, TODAY[good]) for good in GOODS]
    elif skill == "total":
        cases = [("thing", count, price) for count in COUNTS for price in PRICES]
    else:
        cases = [(good, count, TODAY[good]) for good in GOODS for count in COUNTS]
    return [
        {
            "id": f"{split}/{question(skill, good, count, price)}",
            "messages": chat(question(skill, good, count, price)),
            "answer": str(count * price),
            "data_source": skill,
        }
        for good, count, price in cases
        if skill == "price" or split_of(skill, good, count, price) == split
    ]


def chat(text: str) -> list[Mapping[str, str]]:
    """The messages of a question."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
