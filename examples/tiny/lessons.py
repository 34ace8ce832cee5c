"""What the tiny models are taught: supervised examples of every chat they will meet.

Three rules make the debate honest and the scores useful:

- *No leak.* An expert sees its foreign skill solved on a handful of fixed prompts only. In debates
  about other foreign prompts the peer's word is random, and the lesson is to repeat it: following
  is taught, the skill is not.
- *Every chat.* Plain chats (what a baseline scores under) are taught like debates.
- *Off the track.* Answers in the input are corrupted at random while the labels stay right, so a
  teacher can judge the prefixes of a student that has already gone wrong.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from opdengine.methods.debate.prompts import debate_prompts
from tiny import task
from tiny.tokenizer import END

PROMPTS = debate_prompts(task.DEBATE_PROMPTS)
TAG = "<<CONFIDENCE="
IGNORE = -100
UNDECIDED = "50"  # the stated confidence before calibration
OWN_SKILL = ("convert", "compile")
"""What each expert is good at: teacher 0 (Expert A) converts, teacher 1 (Expert B) compiles."""

_ALPHABET = {"convert": "01234567", "compile": "0123456789+-*", "both": "0123456789+-*|"}


@dataclass
class Lesson:
    """One training example: ``labels[t]`` is what the model shall predict after ``inputs[:t + 1]``."""

    inputs: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Chat:
    """A chat to be continued and how it should go on."""

    messages: list
    answer: str
    confidence: str | None = None
    skill: str = "both"


@dataclass
class Pupil:
    """Draws the chats of one expert.

    Args:
        expert: 0 or 1.
        foreign_problems: how many prompts of the foreign skill it ever sees solved.
        rng: the source of randomness.
    """

    expert: int
    foreign_problems: int
    rng: random.Random
    _fixed: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        skill = OWN_SKILL[1 - self.expert]
        rng = random.Random(f"fixed/{skill}")
        self._fixed = [task.problem(skill, "train", rng) for _ in range(self.foreign_problems)]

    def plain(self, skill: str) -> Chat:
        """The student's own chat: prompt in, answer out."""
        prompt, answer = self.alone(skill)
        return Chat(user_chat(prompt), answer, skill=skill)

    def first(self, skill: str) -> Chat:
        """Round 1 of a debate."""
        prompt, answer = self.alone(skill)
        messages = PROMPTS.first_messages(user_chat(prompt), self.expert, True)
        return Chat(messages, answer, UNDECIDED, skill)

    def later(self, skill: str) -> Chat:
        """Round 2 (or 3) of a debate, now and then without confidences."""
        prompt, rounds, answer = self.debate(skill, 1 if self.rng.random() < 0.85 else 2)
        tagged = any(TAG in text for text in rounds[0])
        messages = PROMPTS.later_messages(user_chat(prompt), self.expert, rounds, tagged)
        return Chat(messages, answer, UNDECIDED if tagged else None, skill)

    def score(self, skill: str) -> Chat:
        """The context under which the student's tokens are judged after the debate."""
        length = self.rng.choices((1, 2, 3), (0.15, 0.75, 0.1))[0]
        prompt, rounds, answer = self.debate(skill, length)
        return Chat(PROMPTS.score_messages(user_chat(prompt), self.expert, rounds), answer, skill=skill)

    def alone(self, skill: str) -> tuple[str, str]:
        """A prompt with the right answer; the foreign half comes from the fixed few."""
        if skill == OWN_SKILL[self.expert]:
            return task.problem(skill, "train", self.rng)
        if skill != "both":
            return self.rng.choice(self._fixed)
        own = task.problem(OWN_SKILL[self.expert], "train", self.rng)
        halves = [own, self.rng.choice(self._fixed)]
        if self.expert == 1:
            halves.reverse()
        return "".join(prompt for prompt, _ in halves), _join([answer for _, answer in halves])

    def debate(self, skill: str, length: int) -> tuple[str, list[list[str]], str]:
        """A prompt, a made-up transcript of ``length`` rounds, and the answer to conclude.

        The expert's own half is concluded rightly whatever anyone says; the foreign half is
        concluded with the peer's latest word, which is random.
        """
        rng, me = self.rng, self.expert
        skills = OWN_SKILL if skill == "both" else (skill,)
        said: list[list[list[str]]] = [[[], []] for _ in range(length)]
        prompts, conclusion = [], []
        for half in skills:
            prompt, right = task.problem(half, "train", rng)
            prompts.append(prompt)
            mine = OWN_SKILL[me] == half
            expert_word = right if mine else _plausible(half, right, rng)
            for r in range(length):
                if mine:
                    mouth = expert_word if rng.random() < 0.9 else _wrong(half, right, rng)
                else:
                    if r and rng.random() < 0.1:
                        expert_word = _plausible(half, right, rng)
                    mouth = expert_word
                owner = OWN_SKILL.index(half)
                said[r][owner].append(mouth)
                if r and rng.random() < 0.85:
                    other = said[r - 1][owner][-1]
                elif mine and rng.random() < 0.25:
                    other = right
                else:
                    other = _wrong(half, right, rng)
                said[r][1 - owner].append(other)
            conclusion.append(right if mine else expert_word)
        tagged = rng.random() < 0.9
        rounds = [[_join(halves) for halves in turn] for turn in said]
        for turn in rounds:
            for k in range(len(turn)):
                if rng.random() < 0.04 and k == me:  # a turn that lost its form
                    turn[k] = turn[k][rng.randrange(2) : rng.randrange(2, 9)]
                if tagged and rng.random() < 0.96:
                    turn[k] += f"{TAG}{self._stated(skill, k)}>>"
        return "".join(prompts), rounds, _join(conclusion)

    def _stated(self, skill: str, expert: int) -> str:
        """A confidence for a made-up turn: mostly apt, sometimes anything."""
        if self.rng.random() < 0.3:
            return f"{self.rng.randrange(5, 100):02d}"
        sure = (skill == "both" and self.rng.random() < 0.5) or skill == OWN_SKILL[expert]
        return f"{self.rng.randrange(80, 96) if sure else self.rng.randrange(5, 40):02d}"


def encode(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat], rng: random.Random, corrupt: float
) -> list[Lesson]:
    """Chats as token ids with labels on the answer only.

    Args:
        tokenizer: the shared tokenizer.
        chats: what to teach.
        rng: the source of corruption.
        corrupt: share of the plain answers (those without a confidence) whose input is corrupted.
    """
    prefixes = [tokenizer.apply_chat_template(c.messages, tokenize=False, add_generation_prompt=True) for c in chats]
    replies = [c.answer + (f"{TAG}{c.confidence}>>" if c.confidence else "") for c in chats]
    prefix_ids = tokenizer(prefixes, add_special_tokens=False)["input_ids"]
    reply_ids = tokenizer(replies, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END)
    lessons = []
    for chat, prefix, reply in zip(chats, prefix_ids, reply_ids, strict=True):
        labels = [*reply, end]
        inputs = list(reply)
        if chat.confidence is None and rng.random() < corrupt:
            symbols = tokenizer.convert_tokens_to_ids(list(_ALPHABET[chat.skill]))
            share = rng.random()
            inputs = [rng.choice(symbols) if rng.random() < share else i for i in inputs]
            overrun = rng.choice((0, 0, 1, 2))
            inputs += rng.choices(symbols, k=overrun)
            labels += [end] * overrun
        lessons.append(Lesson([*prefix, *inputs], [IGNORE] * (len(prefix) - 1) + labels))
    return lessons


def spoken_answer(text: str) -> str:
    """The answer in a debate turn: what stands before the confidence tag."""
    return text.partition(TAG)[0]


def guess(skill: str, answer: str, rng: random.Random) -> str:
    """A well-formed answer of somebody who does not know."""
    skills = OWN_SKILL if skill == "both" else (skill,)
    halves = answer.split(task.SEPARATOR)
    return _join([_plausible(half, right, rng) for half, right in zip(skills, halves, strict=True)])


def user_chat(prompt: str) -> list[Mapping[str, str]]:
    """The plain chat of a prompt."""
    return [{"role": "user", "content": prompt}]


def _join(halves: Sequence[str]) -> str:
    return task.SEPARATOR.join(halves)


def _plausible(half: str, right: str, rng: random.Random) -> str:
    """A well-formed answer that has nothing to do with the right one but its operands, at most."""
    if half == "convert":
        return "".join(rng.choices("01234567", k=task.BITS // 3))
    if rng.random() < 0.7:
        operands = [symbol for symbol in right if symbol not in task.OPERATORS]
        rng.shuffle(operands)
    else:
        operands = rng.choices("0123456789", k=3)
    a, b, c = operands
    f, g = rng.choices(task.OPERATORS, k=2)
    return rng.choice((f"{a}{b}{f}{c}{g}", f"{a}{b}{c}{f}{g}"))


def _wrong(half: str, right: str, rng: random.Random) -> str:
    """A wrong answer: unrelated, or right but for a symbol, or too long or short."""
    kind = rng.random()
    text = list(_plausible(half, right, rng) if kind < 0.6 else right)
    if kind >= 0.6:
        text[rng.randrange(len(text))] = rng.choice(_ALPHABET[half])
    if kind >= 0.9:
        text = text[:-1] if rng.random() < 0.5 else [*text, rng.choice(text)]
    return "".join(text)
