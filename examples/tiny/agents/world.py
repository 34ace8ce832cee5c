"""The house as the tiny agents meet it: its words, what an action costs, and the prompts of judge and debate."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping
from typing import Any

from tiny.agents.house import CONTAINERS, ITEMS, ROOMS, VERBS, House

OPTIONS: Mapping[str, Any] = {"format": "action", "instructions": False, "rooms": [3, 3], "turns": [4, 9]}
MAX_TURNS = 12
MAX_TOKENS = 4
"""Of one turn: verb, noun and end; one more shows that a model goes on too long."""

NOUNS = (*ROOMS, *CONTAINERS, *ITEMS, "key", "safe")
WORDS = (*VERBS, *NOUNS, "Task", "find", "the", "bring", "to", "get", "from", "nothing", "To", "new", "The", "holds",
         "is", "in", "You", "have", "Nothing", "happens", "not", "listed", "So", "far", "agent", "environment",
         "What", "happened", "yet", "SKIP", "WEAK", "STRONG")  # fmt: skip

JUDGE_PROMPT = "{history}{task_goal}|{last_obs}|{admissible}|{llm_text}|{next_obs}?"
"""For ``sage.judge_prompt``; the teacher was trained on it, with and without history and next observation."""

DEBATE_PROMPTS = {
    "first": "{task}{confidence}",
    "later": "{task}\n{transcript}\nYou are Expert {expert}. Answer again.{confidence}",
    "score": "{task}\n{transcript}\nYou are Expert {expert}. Give the final answer.",
    "confidence": " How sure are you?",
}
"""For ``debate.prompts``; the teachers that debate were trained on it."""


def twin(world: House) -> House:
    """A copy that can be played without changing the original."""
    return copy.deepcopy(world, {id(world._task): world._task})


def message(action: str) -> dict[str, str]:
    """An action as the agent writes it."""
    return {"role": "assistant", "content": action}


def advice(world: House) -> str:
    """The expert's action."""
    return str(world.expert()["content"])


def remaining(world: House) -> int:
    """Turns that the expert needs from here."""
    player = twin(world)
    return next(turn for turn in itertools.count(1) if player.step(player.expert()).done)


def verdict(world: House, action: str) -> str:
    """What a judge should say of an action, from the turns that it costs.

    SKIP: it costs nothing, or it is the expert's kind of search (another container here, another new room).
    WEAK: it costs a turn or two. STRONG: it cannot be done, costs more, or leads back to a room where
    nothing is left to do.
    """
    best = advice(world)
    if action == best:
        return "SKIP"
    if action not in world.admissible():
        return "STRONG"
    new = {f"go {room}" for room in world._new()}
    if (action.startswith("open") and best.startswith("open")) or {action, best} <= new:
        return "SKIP"
    player = twin(world)
    if player.step(message(action)).done:
        return "SKIP"
    cost = 1 + remaining(player) - remaining(world)
    if cost <= 0:
        return "SKIP"
    back = action.startswith("go") and action not in new
    return "STRONG" if back or cost > 2 else "WEAK"


def stumble(world: House, rng: random.Random) -> str:
    """A random action: mostly one that can be done, sometimes any verb with any noun."""
    if rng.random() < 0.7:
        return rng.choice(world.admissible())
    return f"{rng.choice(tuple(VERBS))} {rng.choice(NOUNS)}"


def hasty(world: House, last: str, rng: random.Random) -> str:
    """The expert with two bad habits.

    It walks on after opening one container, and puts down at once what it holds.

    Args:
        world: the house.
        last: the action before, "" at the start.
        rng: source of randomness.
    """
    best, possible = advice(world), world.admissible()
    if last.startswith("open") and not best.startswith("go"):
        return rng.choice([action for action in possible if action.startswith("go")])
    if best.startswith("go"):
        return next((action for action in possible if action.startswith("put")), best)
    return best
