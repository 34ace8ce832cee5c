"""A house of a few rooms: the tiny world of the demos, in plain Python.

Rooms are joined as a tree; containers in them hide things. Three types of task: ``find`` a thing,
``bring`` it to a room, ``open`` the safe with a hidden key. What a room shows is enough to act well in it:
containers are listed until they are opened and unvisited neighbours are marked "new". A wrong action costs a
turn and nothing else, so success falls smoothly with the share of wrong actions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from opdengine.environments.actions import FORMATS, Action
from opdengine.environments.protocol import Observation, Step, Task
from opdengine.types import Message

HOUSE = f"{__file__}:House"
"""What ``environment.name`` says to play it."""

ROOMS = ("hall", "den", "loft", "shed", "barn", "yard", "cave", "dock")
CONTAINERS = ("box", "jar", "bag", "urn", "tin", "pot")
ITEMS = ("coin", "ring", "book", "lamp", "rope", "cup")
TYPES = ("find", "bring", "open")
SPLITS = ("train", "valid_seen", "valid_unseen")
NOTHING = "Nothing happens."
PATIENCE = 2000
"""Draws without a new task after which there are taken to be no more."""
VERBS = {"go": "room", "open": "container", "take": "thing", "put": "thing", "unlock": "safe"}
HELP = {
    "go": "Walk to a neighbouring room.",
    "open": "Open a container of this room.",
    "take": "Pick up a thing that lies here or in an open container.",
    "put": "Put down a thing that you hold.",
    "unlock": "Unlock the safe of this room; you need the key.",
}
ANSWERS = {
    "action": "Write one action and nothing else.",
    "react": "Write two lines:\nThought: a short thought\nAction: one action",
    "tools": "Call one tool per turn.",
}


@dataclass(frozen=True)
class Options:
    """The world's options.

    Args:
        format: "action" (the message is the action), "react" (``Thought:`` and ``Action:`` lines) or "tools".
        instructions: begin with a system message that explains the actions; models that are trained on
            nothing else do without.
        count: tasks of a split.
        types: task types to draw from, equally often.
        rooms: smallest and largest number of rooms.
        turns: fewest and most turns of the expert.
        max_turns: turns after which an episode is cut off; 0 leaves that to the caller.
        world_seed: another seed draws other tasks.
    """

    format: str = "action"
    instructions: bool = True
    count: int = 200
    types: Sequence[str] = TYPES
    rooms: Sequence[int] = (3, 4)
    turns: Sequence[int] = (4, 12)
    max_turns: int = 0
    world_seed: int = 0

    def __post_init__(self) -> None:
        few, many = self.rooms
        shortest, longest = self.turns
        checks = (
            (self.format in ANSWERS, "format", self.format, f"one of {sorted(ANSWERS)}"),
            (self.count >= 1, "count", self.count, "at least 1"),
            (self.types and set(self.types) <= set(TYPES), "types", self.types, f"some of {TYPES}"),
            (2 <= few <= many <= 5, "rooms", self.rooms, "two numbers from 2 to 5"),
            (2 <= shortest <= longest and longest >= 4, "turns", self.turns, "two numbers, the second 4 or more"),
            (self.max_turns >= 0, "max_turns", self.max_turns, "0 (no limit) or positive"),
        )
        for ok, name, value, remedy in checks:
            if not ok:
                raise ValueError(f"house: {name}={value!r} is not possible; it must be {remedy}")


class House:
    """The environment; see the module and :class:`Options`."""

    option_class = Options

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """Tasks of a split, disjoint by content; the layouts of "valid_unseen" occur in no other split.

        Raises:
            ValueError: the split is unknown, or the options leave too few tasks.
        """
        if split not in SPLITS:
            raise ValueError(f"house: unknown split {split!r}; use one of {SPLITS}")
        wanted = Options(**options)
        tasks: dict[str, Task] = {}
        last = 0
        for number in itertools.count():
            kind = wanted.types[len(tasks) % len(wanted.types)]
            task = _draw(Random(f"{wanted.world_seed}/{split}/{number}"), wanted, kind)
            fits = _split(task) == split and wanted.turns[0] <= _expert_turns(task) <= wanted.turns[1]
            if fits and task["id"] not in tasks:
                tasks[task["id"]], last = task, number
            if len(tasks) == wanted.count:
                break
            if number - last > PATIENCE:
                raise ValueError(f"house: found {len(tasks)} of count={wanted.count} tasks; widen rooms or turns")
        return list(tasks.values())

    def reset(self, *, seed: int, task: Task) -> Observation:
        """Begin; the task says everything, so the seed changes nothing."""
        self._task = task
        self._here: str = task["start"]
        self._seen = {self._here}
        self._shut = {name: room for name, (room, _) in task["containers"].items()}
        self._places = {thing: name for name, (_, thing) in task["containers"].items() if thing}
        self._taken = 0
        self._success = False
        text = f"Task: {task['goal']}\n{self._room()}"
        messages: list[Message] = [{"role": "user", "content": text}]
        if self.options.instructions:
            messages.insert(0, {"role": "system", "content": _instructions(self.options.format)})
        info = {
            "goal": task["goal"],
            "type": task["type"],
            "observation": self._room(),
            "admissible": self.admissible(),
        }
        return Observation(tuple(messages), _tools() if self.options.format == "tools" else (), info)

    def step(self, message: Message) -> Step:
        """Execute the message's action; what cannot be done is answered with "Nothing happens."."""
        action = FORMATS[self.options.format](message)
        text, failure = self._read(action)
        observation = NOTHING if failure else self._execute(*text.split(" "))
        self._taken += 1
        truncated = not self._success and 0 < self.options.max_turns <= self._taken
        info: dict[str, Any] = {
            "action": "" if failure else text,
            "failure": failure,
            "observation": observation,
            "admissible": [] if self._success else self.admissible(),
        }
        if self._success or truncated:
            info |= {"success": self._success, "score": float(self._success)}
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        answer: Message = {"role": "user", "content": observation}
        if self.options.format == "tools" and calls:
            answer = {"role": "tool", "name": action.name, "content": observation}
        return Step((answer,), float(self._success), self._success, truncated, info)

    def close(self) -> None:
        """There is nothing to give back."""

    def admissible(self) -> list[str]:
        """Every action that does something now."""
        actions = [f"go {room}" for room in self._task["exits"][self._here]]
        actions += [f"open {name}" for name, room in self._shut.items() if room == self._here and name != "safe"]
        actions += [f"take {thing}" for thing in self._lying()]
        actions += [f"put {thing}" for thing, place in self._places.items() if place == "you"]
        if self._shut.get("safe") == self._here and self._places.get("key") == "you":
            actions.append("unlock safe")
        return actions

    def expert(self) -> Message:
        """Act on what has been seen only: look into everything near, then walk on to what is new."""
        verb, noun = self._advice().split(" ")
        if self.options.format == "tools":
            call = {"name": verb, "arguments": {VERBS[verb]: noun}}
            return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        thought = "Thought: I go on.\nAction: " if self.options.format == "react" else ""
        return {"role": "assistant", "content": f"{thought}{verb} {noun}"}

    def _read(self, action: Action) -> tuple[str, str]:
        """The action's text, and why it cannot be executed."""
        text, failure = action.name, action.failure
        if self.options.format == "tools" and not failure:
            noun = action.arguments.get(VERBS.get(text, ""))
            if len(action.arguments) != 1 or not isinstance(noun, str):
                return text, "tool_error"
            text = f"{text} {noun}"
        text = text.lower().removesuffix(".")
        if not failure and text not in self.admissible():
            failure = "invalid_action" if text.split(" ")[0] in VERBS else "unparseable"
        return text, failure

    def _room(self) -> str:
        """What is seen on entering, e.g. "den: box, coin. To hall, new shed."."""
        shut = [name for name, room in self._shut.items() if room == self._here]
        ways = [("" if room in self._seen else "new ") + room for room in self._task["exits"][self._here]]
        return f"{self._here}: {', '.join(shut + self._lying()) or 'nothing'}. To {', '.join(ways)}."

    def _lying(self) -> list[str]:
        """Things that can be taken here."""
        containers = self._task["containers"]
        here = [name for name, (room, _) in containers.items() if room == self._here and name not in self._shut]
        return [thing for thing, place in self._places.items() if place in (self._here, *here)]

    def _execute(self, verb: str, noun: str) -> str:
        task = self._task
        if verb == "go":
            self._here = noun
            self._seen.add(noun)
            return self._room()
        if verb == "take":
            self._places[noun] = "you"
            self._success = task["type"] in ("find", "open") and noun == task["item"]
            return f"You have the {noun}."
        if verb == "put":
            self._places[noun] = self._here
            self._success = task["type"] == "bring" and noun == task["item"] and self._here == task["target"]
            return f"The {noun} is in the {self._here}."
        del self._shut[noun]
        return f"The {noun} holds {self._inside(noun) or 'nothing'}."

    def _inside(self, container: str) -> str:
        return next((thing for thing, place in self._places.items() if place == container), "")

    def _advice(self) -> str:
        """The expert's action."""
        item, kind, target = self._task["item"], self._task["type"], self._task["target"]
        if kind == "bring" and self._places[item] == "you":
            return self._toward({target}, f"put {item}")
        if self._known(item):
            return self._toward({self._where(item)}, f"take {item}")
        key_held = self._places.get("key") == "you"
        if kind == "open" and key_held and self._shut["safe"] in self._seen:
            return self._toward({self._shut["safe"]}, "unlock safe")
        if kind == "open" and not key_held and self._known("key"):
            return self._toward({self._where("key")}, "take key")
        shut = [name for name, room in self._shut.items() if room in self._seen and name != "safe"]
        if shut and not key_held:
            rooms = {self._shut[name] for name in shut}
            near = next((name for name in shut if self._shut[name] == self._here), "")
            return self._toward(rooms | self._new(), f"open {near}")
        return self._toward(self._new(), "")

    def _new(self) -> set[str]:
        """Rooms that were not entered but seen from a neighbour."""
        return {room for seen in self._seen for room in self._task["exits"][seen]} - self._seen

    def _known(self, thing: str) -> bool:
        place = self._places.get(thing, "you")
        return place != "you" and place not in self._shut and self._where(thing) in self._seen

    def _where(self, thing: str) -> str:
        place = self._places[thing]
        return self._task["containers"][place][0] if place in self._task["containers"] else place

    def _toward(self, rooms: set[str], there: str) -> str:
        """The first step to the nearest of the rooms, or what to do there."""
        paths = deque([(self._here, "")])
        tried = {self._here}
        while paths:
            room, first = paths.popleft()
            if room in rooms:
                return f"go {first}" if first else there
            for exit_ in self._task["exits"][room] if room in self._seen else ():
                if exit_ not in tried:
                    tried.add(exit_)
                    paths.append((exit_, first or exit_))
        # The target has not been seen yet.
        return self._toward(self._new(), "")


def _draw(random: Random, options: Options, kind: str) -> Task:
    """A random task; its id is the hash of its content."""
    rooms = random.sample(ROOMS, random.randint(*options.rooms))
    exits: dict[str, list[str]] = {room: [] for room in rooms}
    for i, room in enumerate(rooms[1:], start=1):
        other = random.choice([r for r in rooms[:i] if len(exits[r]) < 3])
        exits[room].append(other)
        exits[other].append(room)
    free = [room for room in rooms for _ in range(2)]
    random.shuffle(free)
    names = random.sample(CONTAINERS, min(len(CONTAINERS), random.randint(len(rooms) - 1, len(rooms) + 1)))
    containers = {name: [free.pop(), ""] for name in names}
    item = random.choice(ITEMS)
    hidden, start, target = random.choice(names), random.choice(rooms), ""
    goal = f"find the {item}."
    if kind == "bring":
        target = random.choice([room for room in rooms if room != containers[hidden][0]])
        goal = f"bring the {item} to the {target}."
    if kind == "open":
        containers["safe"] = [free.pop(), item]
        goal = f"get the {item} from the safe."
    containers[hidden][1] = "key" if kind == "open" else item
    content = {
        "type": kind,
        "goal": goal,
        "item": item,
        "target": target,
        "start": start,
        "exits": exits,
        "containers": containers,
    }
    return {"id": f"house-{kind}-{_hash(content)[:12]}", **content}


def _split(task: Task) -> str:
    """By the hash of the layout (rooms and their connections), then of the whole content: 15 % each."""
    layout = sorted((room, sorted(exits)) for room, exits in task["exits"].items())
    if int(_hash(layout), 16) % 100 < 15:
        return "valid_unseen"
    return "valid_seen" if int(task["id"][-12:], 16) % 100 < 15 else "train"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _expert_turns(task: Task) -> int:
    world = House()
    world.reset(seed=0, task=task)
    for turns in itertools.count(1):
        if world.step(world.expert()).done:
            return turns
    raise AssertionError("unreachable")


def _instructions(format_: str) -> str:
    lines = ["You are in a house and do a task, one action per turn."]
    if format_ != "tools":
        lines += [
            "Actions:",
            *(f"{verb} {noun.upper() if noun != 'safe' else noun}: {HELP[verb]}" for verb, noun in VERBS.items()),
        ]
    return "\n".join([*lines, ANSWERS[format_]])


def _tools() -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {
            "type": "function",
            "function": {
                "name": verb,
                "description": HELP[verb],
                "parameters": {"type": "object", "properties": {noun: {"type": "string"}}, "required": [noun]},
            },
        }
        for verb, noun in VERBS.items()
    )
