"""What the tiny agents are taught: whole episodes, the judge's answers, and debates about single steps.

Episodes are played with wrong actions among the right ones while the labels stay the expert's, so a
teacher knows the way out of the states that a weak student gets into.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerFast

from opdengine.environments.protocol import Task
from opdengine.methods.debate.prompts import debate_prompts
from opdengine.types import Message
from tiny.agents import world as house
from tiny.agents.house import House
from tiny.lessons import IGNORE, TAG, Lesson
from tiny.tokenizer import END

HISTORY_SHARE, NEXT_SHARE = 0.25, 0.25
KEEP_SKIP = 0.5
PROMPTS = debate_prompts(house.DEBATE_PROMPTS)
SURE, UNSURE = "95", "10"


@dataclass
class Moment:
    """One turn of an episode.

    Args:
        chat: what the agent sees.
        action: what it does.
        right: what it should do.
        possible: what it could do.
        verdict: what the judge should say of ``query["llm_text"]``; "" where nobody asks.
        query: the judge's question without history and next observation.
        next_obs: what would happen then.
    """

    chat: list[Message]
    action: str
    right: str
    possible: list[str]
    verdict: str = ""
    query: dict[str, str] = field(default_factory=dict)
    next_obs: str = ""


def play(
    task: Task, rng: random.Random, noise: float, judged: float = 0.0, aimless: bool = False, haste: float = 0.0
) -> list[Moment]:
    """An episode with a share of wrong actions.

    Args:
        task: of the house.
        rng: source of randomness.
        noise: share of wrong actions.
        judged: share of the turns about which the judge is asked; always about an action that is possible,
            because nobody asks about the others.
        aimless: what it "should" do is any possible action.
        haste: share of the turns in which the expert follows its bad habits (:func:`tiny.agents.world.hasty`).
    """
    world = House(**house.OPTIONS)
    start = world.reset(seed=0, task=task)
    chat, moments = list(start.messages), []
    seen, possible = start.info["observation"], start.info["admissible"]
    for _ in range(house.MAX_TURNS):
        best = (
            house.hasty(world, moments[-1].action if moments else "", rng)
            if rng.random() < haste
            else house.advice(world)
        )
        action = house.stumble(world, rng) if rng.random() < noise else best
        moment = Moment(list(chat), action, rng.choice(possible) if aimless else best, possible)
        if rng.random() < judged:
            asked = best if rng.random() < 0.2 else rng.choice(possible)
            moment.verdict = house.verdict(world, asked)
            listed = ", ".join(possible) or "not listed"
            moment.query = {"task_goal": task["goal"], "last_obs": seen, "admissible": listed, "llm_text": asked}
            moment.next_obs = house.twin(world).step(house.message(asked)).info["observation"]
        moments.append(moment)
        step = world.step(house.message(action))
        if step.done:
            break
        chat += [house.message(action), *step.messages]
        seen, possible = step.info["observation"], step.info["admissible"]
    return moments


def question(moment: Moment, history: bool, next_observation: bool, judge_prompt: str = house.JUDGE_PROMPT) -> str:
    """The judge's question about a moment, word for word as SAGE-OPD asks it."""
    names = {"assistant": "agent", "user": "environment"}
    past = "\n".join(f"{names[m['role']]}: {m['content']}" for m in moment.chat[1:]) or "nothing yet"
    return judge_prompt.format(
        **moment.query,
        history=f"So far:\n{past}\n" if history else "",
        next_obs=f"What happened: {moment.next_obs}" if next_observation else "",
    )


@dataclass
class Pupil:
    """Draws the lessons of one model.

    Args:
        tokenizer: of all tiny agents.
        tasks: to play.
        rng: source of randomness.
        noise: shares of wrong actions; each episode draws one.
        expert: place in the debate (0 or 1), or None for one that never debates.
        foreign: the task type about which it knows nothing.
        haste: how often it is shown bad habits.
        judge_prompt: the words of the judge's question.
        end: the text of the token that ends a turn.
    """

    tokenizer: PreTrainedTokenizerFast
    tasks: Sequence[Task]
    rng: random.Random
    noise: Sequence[float] = (0.0, 0.1, 0.3, 0.6)
    expert: int | None = None
    foreign: str = ""
    haste: float = 0.0
    judge_prompt: str = house.JUDGE_PROMPT
    end: str = END

    def episodes(self, count: int) -> list[Lesson]:
        """Whole episodes, one lesson each."""
        return [self._episode(moments) for moments, _ in (self._play() for _ in range(count))]

    def judgements(self, count: int) -> list[Lesson]:
        """The judge's question and its answer; some with history, some with what happens next.

        Most turns are fine, so those are thinned out: the rest is what has to be learned.
        """
        lessons: list[Lesson] = []
        while len(lessons) < count:
            for moment in play(self.rng.choice(self.tasks), self.rng, self.rng.choice(self.noise), judged=0.3):
                if moment.verdict and (moment.verdict != "SKIP" or self.rng.random() < KEEP_SKIP):
                    kind = self.rng.random()
                    history, later = kind < HISTORY_SHARE, HISTORY_SHARE < kind < HISTORY_SHARE + NEXT_SHARE
                    chat: list[Message] = [
                        {"role": "user", "content": question(moment, history, later, self.judge_prompt)}
                    ]
                    lessons.append(self._reply(chat, moment.verdict))
        return lessons[:count]

    def debates(self, count: int) -> list[Lesson]:
        """Single steps in a debate: its own kinds of task done rightly, the foreign kind as the peer says.

        The peer's word about foreign tasks is any possible action, so following is taught and the task is not.
        """
        assert self.expert is not None
        lessons = []
        for _ in range(count):
            moments, foreign = self._play()
            moment = self.rng.choice(moments)
            rounds = [self._said(moment, foreign) for _ in range(1 if self.rng.random() < 0.8 else 2)]
            follow = rounds[-1][1 - self.expert].partition(TAG)[0]
            answer = follow if foreign else moment.right
            kind = self.rng.choices(("first", "later", "score"), (0.2, 0.4, 0.4))[0]
            if kind == "score":
                chat = PROMPTS.score_messages(moment.chat, self.expert, rounds)
                lessons.append(self._judged(chat, replace(moment, right=answer)))
            elif kind == "first":
                chat = PROMPTS.first_messages(moment.chat, self.expert, True)
                lessons.append(self._reply(chat, f"{moment.right}{TAG}{UNSURE if foreign else SURE}>>"))
            else:
                chat = PROMPTS.later_messages(moment.chat, self.expert, rounds, True)
                lessons.append(self._reply(chat, f"{answer}{TAG}{SURE}>>"))
        return lessons

    def _play(self) -> tuple[list[Moment], bool]:
        task = self.rng.choice(self.tasks)
        foreign = task["type"] == self.foreign
        return play(task, self.rng, self.rng.choice(self.noise), aimless=foreign, haste=self.haste), foreign

    def _said(self, moment: Moment, foreign: bool) -> list[str]:
        """What both experts may have said: the one who knows is sure, the other says anything."""
        mine = f"{moment.right}{TAG}{UNSURE if foreign else SURE}>>"
        knows = foreign or self.rng.random() < 0.5
        word = self.rng.choice(moment.possible) if foreign or not knows else moment.right
        peer = f"{word}{TAG}{SURE if knows else UNSURE}>>"
        return [mine, peer] if self.expert == 0 else [peer, mine]

    def _episode(self, moments: Sequence[Moment]) -> Lesson:
        inputs = self._ids(self._text(moments[0].chat[:1]))
        labels = [IGNORE] * (len(inputs) - 1)
        for number, moment in enumerate(moments):
            done, wanted = self._turn(moment)
            inputs += done[:-1]
            labels += wanted
            if number + 1 < len(moments):
                answer = self._ids(self._text(moments[number + 1].chat[-1:]))
                inputs += [done[-1], *answer]
                labels += [IGNORE] * len(answer)
        return Lesson(inputs, labels)

    def _judged(self, chat: Sequence[Message], moment: Moment) -> Lesson:
        """What the agent did, read behind another chat."""
        asked = self._ids(self._text(chat))
        done, wanted = self._turn(moment)
        return Lesson([*asked, *done[:-1]], [IGNORE] * (len(asked) - 1) + wanted)

    def _reply(self, chat: Sequence[Message], reply: str) -> Lesson:
        asked, answer = self._ids(self._text(chat)), self._ids(reply + self.end)
        return Lesson([*asked, *answer[:-1]], [IGNORE] * (len(asked) - 1) + answer)

    def _turn(self, moment: Moment) -> tuple[list[int], list[int]]:
        """Ids of what was done (verb, noun, end) and of what should follow at each place.

        After a wrong verb the right noun is that of a possible action with this verb, if there is one.
        """
        done, right = self._ids(moment.action + self.end), self._ids(moment.right + self.end)
        noun = right[1]
        if done[0] != right[0]:
            verb = moment.action.split(" ")[0]
            same = [action for action in moment.possible if action.split(" ")[0] == verb]
            noun = self._ids(self.rng.choice(same))[1] if same else IGNORE
        return done, [right[0], noun, done[2]]

    def _text(self, chat: Sequence[Message]) -> str:
        """A chat up to where the agent writes."""
        text = self.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        return str(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
