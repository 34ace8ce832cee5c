"""Players for the environments of text commands."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from opdengine.environments import FAILURES

ODD_MESSAGES = [
    {"role": "assistant", "content": None},
    {"role": "assistant"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "   \n\n "},
    {"role": "assistant", "content": 42},
    {"role": "assistant", "content": ["look", {"type": "text", "text": 3}]},
    {"role": "assistant", "content": "I would rather not."},
    {"role": "assistant", "content": "Thought: I think\nAction:"},
    {"role": "assistant", "content": "Action: " + "look " * 200_000},
    {"role": "assistant", "content": "Thought: \x00\ud7ff🙂\nAction: \x00\u202e 🙂 %s {o.name} [[x]] ` \\"},
    {"role": "assistant", "content": "Action: go\nto\nnowhere\nAction: look"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": None}]},
    {},
]


def say(command: str) -> dict:
    return {"role": "assistant", "content": f"Thought: so be it\nAction: {command}"}


def play_expert(world, task, limit: int = 150):
    """Steps of the expert from the start to the end of the task."""
    start = world.reset(seed=0, task=task)
    steps, admissible = [], start.info["admissible"]
    while not steps or not steps[-1].done:
        assert len(steps) < limit, f"the expert needs more than {limit} turns for {task}"
        message = world.expert()
        steps.append(world.step(message))
        assert steps[-1].info["failure"] == "", (message, admissible)
        admissible = steps[-1].info["admissible"]
    return start, steps


def play_random(world, tasks, turns: int, seed: int = 0) -> tuple[int, int]:
    """Turns played and turns that failed, of a player who draws from the admissible commands."""
    draw = random.Random(seed)
    played = failed = 0
    while played < turns:
        seen = world.reset(seed=seed, task=draw.choice(tasks))
        for _ in range(40):
            assert seen.info["admissible"], "no command works and the episode goes on"
            seen = world.step(say(draw.choice(seen.info["admissible"])))
            played += 1
            failed += seen.info["failure"] != ""
            if seen.done:
                break
    return played, failed


def play_odd_messages(world) -> None:
    """Send every odd message; each is answered, none changes the world."""
    for message in ODD_MESSAGES:
        step = world.step(message)
        assert step.info["failure"] in FAILURES[:3] + FAILURES[4:], message
        assert step.info["action"] == "" and step.reward == 0 and not step.done
        assert step.messages[0]["role"] == "user" and step.messages[0]["content"]
        assert len(json.dumps(step.messages)) < 20_000


def transcript(name: str, split: str, options: dict, turns: int) -> str:
    """A hash of everything that a world says in its first tasks, the same commands given."""
    from opdengine.environments import load_environment

    kind = load_environment(name)
    world, digest = kind(**options), hashlib.sha256()
    draw = random.Random(0)
    for task in kind.tasks(split, **options)[:3]:
        seen = world.reset(seed=1, task=task)
        for _ in range(turns):
            digest.update(json.dumps([seen.messages, seen.info]).encode())
            if getattr(seen, "done", False):
                break
            seen = world.step(say(draw.choice(seen.info["admissible"])))
    world.close()
    return digest.hexdigest()


def transcripts_of_two_processes(name: str, split: str, options: dict, turns: int) -> list[str]:
    """The same in two processes whose sets have different orders."""
    code = f"import envs_helpers as h; print(h.transcript({name!r}, {split!r}, {options!r}, {turns}))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    return [process.communicate()[0] for process in processes]
