"""What the two experts are taught: supervised chats of every kind that a debate renders.

Three rules keep the experts apart. In the lessons of an expert the peer's knowledge is *random*: B reads
random prices of A, and A random totals of B; to follow is taught, the skill is not. Confidences say who knows:
SURE of the own skill, UNSURE outside it, LED where the peer's word is followed. And every chat that the engine's
debate uses, the plain one and the one under which the student is judged included, is among the lessons.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from opdengine.methods.debate.prompts import debate_prompts
from opdengine.types import Message
from real import market

PROMPTS = debate_prompts(market.DEBATE_PROMPTS)
SURE, LED, UNSURE = 95, 60, 20
KINDS = ("plain", "first", "later", "score")


@dataclass(frozen=True)
class Lesson:
    """A chat and its continuation.

    Args:
        messages: that are read.
        reply: that is learned.
        given: so many characters of the reply are read and not learned.
    """

    messages: Sequence[Message]
    reply: str
    given: int = 0


@dataclass(frozen=True)
class Case:
    """A question, and what each expert believes about it in the first round and in the last.

    Args:
        skill, good, count, price: of the question; ``price`` is stated in "total" questions only.
        said: [2] the first words of A and B: (price, total, confidence).
        concluded: [2] their words after they have read the first ones.
    """

    skill: str
    good: str
    count: int
    price: int
    said: tuple[tuple[int, int, int], tuple[int, int, int]]
    concluded: tuple[tuple[int, int, int], tuple[int, int, int]]

    @property
    def question(self) -> str:
        """What is asked."""
        return market.question(self.skill, self.good, self.count, self.price)

    def text(self, words: tuple[int, int, int], tagged: bool = True) -> str:
        """A turn of the debate."""
        price, total, confidence = words
        sentence = market.reply(self.skill, self.good, self.count, price, total)
        return f"{sentence} <<CONFIDENCE={confidence}>>" if tagged else sentence


def case(skill: str, pupil: int, rng: random.Random) -> Case:
    """A random question with a debate that teaches one expert nothing of the other's skill.

    Args:
        skill: "price", "total" or "both".
        pupil: 0 teaches A, to whom B's totals are random; 1 teaches B, to whom A's prices are random.
        rng: the source of randomness.
    """
    good = rng.choice(market.GOODS)
    count = 1 if skill == "price" else rng.choice(market.COUNTS)
    stated = rng.choice(market.PRICES)
    a_price = market.TODAY[good] if pupil == 0 else rng.choice(market.PRICES)
    b_price = market.LAST_YEAR[good]
    if skill == "total":
        a_price = b_price = stated

    def product(price: int) -> int:
        return count * price if pupil == 1 or skill == "price" else rng.randrange(6, 49)

    a_first = (a_price, a_price + count if skill != "price" else a_price, SURE if skill == "price" else UNSURE)
    b_first = (b_price, product(b_price), SURE if skill == "total" else UNSURE)
    if skill == "price":
        a_last, b_last = a_first, (a_price, a_price, LED)
    elif skill == "total":
        a_last, b_last = (a_price, b_first[1], LED), b_first
    else:
        a_last, b_last = a_first, (a_price, product(a_price), SURE)
    return Case(skill, good, count, stated, (a_first, b_first), (a_last, b_last))


def verdict(drawn: Case, pupil: int) -> tuple[int, int, int]:
    """What an expert holds under the whole transcript: A's price and B's last total."""
    (a_price, _, _), (_, b_total, _) = drawn.concluded
    return a_price, b_total, 0


def lesson(kind: str, skill: str, pupil: int, rng: random.Random) -> Lesson:
    """One lesson of an expert.

    Args:
        kind: "plain" (asked as the student is), "first", "later" (rounds of the debate) or "score" (judging).
        skill: of the question.
        pupil: 0 for A, 1 for B.
        rng: the source of randomness.
    """
    drawn = case(skill, pupil, rng)
    asked = market.chat(drawn.question)
    said = [[drawn.text(words) for words in drawn.said]]
    if kind == "first":
        return Lesson(PROMPTS.first_messages(asked, pupil, True), drawn.text(drawn.said[pupil]))
    if kind == "later":
        return Lesson(PROMPTS.later_messages(asked, pupil, said, True), drawn.text(drawn.concluded[pupil]))
    if kind == "score":
        rounds = [*said, [drawn.text(words) for words in drawn.concluded]]
        return Lesson(PROMPTS.score_messages(asked, pupil, rounds), drawn.text(verdict(drawn, pupil), tagged=False))
    words = drawn.said[pupil]
    if skill != "both" or rng.random() < 0.5:
        return Lesson(asked, drawn.text(words, tagged=False))
    # The student may write any price: what follows from it is judged, too.
    price = rng.choice(market.PRICES)
    sentence = drawn.text((price, price + drawn.count if pupil == 0 else price * drawn.count, 0), tagged=False)
    return Lesson(asked, sentence, sentence.index(","))
