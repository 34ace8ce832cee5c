"""What the tests of agents share: rollouts of several turns by hand, and an environment without processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from opdengine.environments.protocol import Broken, Observation, Step, Task
from opdengine.types import Completion, Message, Prompt, Request, Sample, SamplingParams, TeacherContext, Turn


def make_rollout(
    lengths: Sequence[int],
    *,
    name: str = "r",
    failures: Sequence[str] = (),
    texts: Sequence[str] = (),
    seed: int = 0,
    version: int = 0,
    **info: Any,
) -> Sample:
    """A trajectory whose turns have so many tokens, with an answer of two tokens between them."""
    draw = np.random.default_rng(seed)
    turns = [Turn("prompt", draw.integers(1, 50, 3))]
    for i, length in enumerate(lengths):
        text = texts[i] if texts else f"do {i}"
        found = {
            "failure": failures[i] if failures else "",
            "observation": f"see {i}",
            "admissible": [f"do {i}", "wait"],
        }
        turns.append(
            Turn(
                "assistant",
                draw.integers(1, 50, length),
                draw.normal(-1, 0.3, length),
                True,
                ({"role": "assistant", "content": text},),
                found,
            )
        )
        if i + 1 < len(lengths):
            turns.append(
                Turn("environment", draw.integers(1, 50, 2), messages=({"role": "user", "content": f"see {i}"},))
            )
    start = {"goal": "win", "type": "game", "observation": "a room", "admissible": ["look", "go"]}
    prompt = Prompt("task", ({"role": "user", "content": "win the game"},), key="game")
    return Sample(name, prompt, tuple(turns), version, info={**start, "success": False, "score": 0.0, **info})


def context(rollout: Sample, teacher: str = "t") -> TeacherContext:
    """The teacher reads the trajectory under the student's own prompt."""
    return TeacherContext(rollout.id, teacher, rollout.token_ids, rollout.target_positions)


class Countdown:
    """Wins when the message holds the number that the environment named; tells the next one otherwise."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        return [{"id": f"{split}{i}", "type": "count"} for i in range(4)]

    def reset(self, *, seed: int, task: Task) -> Observation:
        self.left = self.turns
        return Observation(({"role": "user", "content": f"task {task['id']}"},), info={"goal": "count", "seed": seed})

    def step(self, message: Message) -> Step:
        self.left -= 1
        done = self.left == 0
        info: dict[str, Any] = {
            "action": str(message["content"])[:3],
            "failure": "",
            "observation": f"{self.left} left",
        }
        if done:
            info |= {"success": True, "score": 1.0}
        answer = () if done else ({"role": "user", "content": f"{self.left} left"},)
        return Step(answer, float(done), terminated=done, info=info)

    def close(self) -> None:
        pass


class LocalPool:
    """An environment pool in this process.

    Args:
        make: slot -> environment.
        size: slots.
        broken: (slot, number of its step from 0) -> what breaks there.
    """

    def __init__(self, make: Any, size: int, broken: Mapping[tuple[int, int], Broken] | None = None) -> None:
        self.size = size
        self.environments = [make() for _ in range(size)]
        self.broken = dict(broken or {})
        self.taken = [0] * size
        self.batches: list[int] = []

    def reset(self, jobs: Mapping[int, tuple[int, Task]]) -> dict[int, Observation | Broken]:
        return {s: self.environments[s].reset(seed=seed, task=task) for s, (seed, task) in jobs.items()}

    def step(self, messages: Mapping[int, Message]) -> dict[int, Step | Broken]:
        self.batches.append(len(messages))
        answers: dict[int, Step | Broken] = {}
        for slot, message in messages.items():
            place = (slot, self.taken[slot])
            self.taken[slot] += 1
            answers[slot] = self.broken.get(place) or self.environments[slot].step(message)
        return answers

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Scripted:
    """A sampler that says what a function of the request tells, and remembers the requests."""

    def __init__(self, tokenizer: Any, reply: Any) -> None:
        self.tokenizer = tokenizer
        self.reply = reply
        self.policy_version = 0
        self.requests: list[Request] = []
        self.params: list[SamplingParams] = []

    def chats(self) -> AbstractContextManager[None]:
        return nullcontext()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        self.requests += requests
        self.params.append(params)
        return [[self.complete(request)] for request in requests]

    def complete(self, request: Request) -> Completion:
        text = self.reply(request)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        return Completion(np.array(ids), np.full(len(ids), -0.5), "stop", text)
