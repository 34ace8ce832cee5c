"""Games for ALFWorld's text engine, made from what its package ships.

The package holds the floor plans of the 120 rooms in which ALFRED was recorded (which furniture stands where,
which things lie about), the rules of the world (PDDL), its language, the goals of the tasks and what fits
where. A game puts things at random into a room and asks for one of the six tasks. The engine is the
benchmark's, the games are not: where things lie was drawn here, and the way to success is short.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from opdengine.environments.commands import optional
from opdengine.environments.protocol import Task

TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
APPLIANCES = {TYPES[2]: "SinkBasin", TYPES[3]: "Microwave", TYPES[4]: "Fridge"}
PROPERTIES = {TYPES[2]: "Cleanable", TYPES[3]: "Heatable", TYPES[4]: "Coolable"}
ROOMS = (*range(1, 31), *range(201, 231), *range(301, 331), *range(401, 431))
UNSEEN_ROOMS = frozenset((10, 20, 30, 209, 219, 229, 308, 318, 328, 404, 414, 424))
"""Three of each kind of room, among them the four of the benchmark's valid_unseen split (10, 219, 308, 424)."""
SPLITS = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
"""Splits and their sizes in the benchmark."""
MOST_OF_A_KIND = 8
"""Receptacles of one kind in a room; a few rooms have up to 27 drawers, which makes the engine slow."""
LAMP = "DeskLamp"
LAMP_PLACES = ("Desk", "SideTable", "Dresser", "Shelf")


@dataclass(frozen=True)
class Receptacle:
    """A piece of furniture: name in the PDDL, kind, and name of the place before it."""

    name: str
    kind: str
    location: str


@dataclass(frozen=True)
class Room:
    """A room without its things: its receptacles, and the kinds of things that may lie in it."""

    receptacles: tuple[Receptacle, ...]
    things: tuple[str, ...]

    def places(self, thing: str) -> tuple[Receptacle, ...]:
        """Return the receptacles where such a thing may lie."""
        fits = _knowledge().fits
        if thing == LAMP:
            return tuple(r for r in self.receptacles if r.kind in LAMP_PLACES)
        return tuple(r for r in self.receptacles if thing in fits.get(r.kind, ()))


@dataclass(frozen=True)
class _Knowledge:
    """The package's knowledge: where things fit, what can be done to them, what opens, what can be carried."""

    fits: Mapping[str, frozenset[str]]
    actions: Mapping[str, frozenset[str]]
    openable: frozenset[str]
    movable: frozenset[str]
    goals: Mapping[str, Mapping[str, Any]]


def package_folder() -> Path:
    """Return the folder of the ``alfworld`` package without importing it.

    Raises:
        ImportError: it is not installed; names the pip command.
    """
    spec = importlib.util.find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("this environment needs 'alfworld': pip install \"opdengine[alfworld]\"")
    folder = Path(spec.submodule_search_locations[0])
    if not (Path.home() / ".cache" / "alfworld").is_dir():  # else importing the package would create it
        os.environ.setdefault("ALFWORLD_DATA", str(folder / "data"))
    return folder


@cache
def _knowledge() -> _Knowledge:
    package_folder()
    constants = optional("alfworld.gen.constants", "alfworld")
    return _Knowledge(
        fits={kind: frozenset(things) for kind, things in constants.VAL_RECEPTACLE_OBJECTS.items()},
        actions={action: frozenset(things) for action, things in constants.VAL_ACTION_OBJECTS.items()},
        openable=frozenset(constants.OPENABLE_CLASS_SET),
        movable=frozenset(constants.MOVABLE_RECEPTACLES_SET),
        goals=optional("alfworld.gen.goal_library", "alfworld").gdict,
    )


@cache
def room(number: int) -> Room:
    """The room of an ALFRED floor plan.

    Furniture that the floor plan lists without a position gets a place of its own.

    Args:
        number: 1 to 30 kitchens, 201 to 230 living rooms, 301 to 330 bedrooms, 401 to 430 bathrooms.
    """
    layouts = package_folder() / "gen" / "layouts"
    listed: list[str] = json.loads((layouts / f"FloorPlan{number}-objects.json").read_text())
    positions: dict[str, list[float]] = json.loads((layouts / f"FloorPlan{number}-openable.json").read_text())
    knows = _knowledge()
    furniture: list[tuple[str, tuple[Any, ...]]] = [(_kind(name), tuple(place)) for name, place in positions.items()]
    known = {kind for kind, _ in furniture}
    for kind in sorted(set(listed) - known):
        if kind in knows.fits and kind not in knows.movable:
            furniture += [(kind, (kind, i)) for i in range(4 if kind == "StoveBurner" else 1)]
    locations = {place: f"loc_bar_{i}" for i, place in enumerate(dict.fromkeys(place for _, place in furniture))}
    numbers: Counter[str] = Counter()
    receptacles = []
    for kind, place in furniture:
        numbers[kind] += 1
        if numbers[kind] <= MOST_OF_A_KIND:
            receptacles.append(Receptacle(_name(kind, numbers[kind]), kind, locations[place]))
    portable = frozenset().union(*knows.fits.values()) | {LAMP}
    found = Room(tuple(receptacles), tuple(sorted(set(listed) & portable)))
    return Room(found.receptacles, tuple(thing for thing in found.things if found.places(thing)))


def _kind(name: str) -> str:
    """``Sink|-00.70|+00.93|-00.65|SinkBasin`` is a SinkBasin; other names begin with their kind."""
    return name.rsplit("|", 1)[1] if name.endswith("Basin") else name.split("|", 1)[0]


def _name(kind: str, number: int) -> str:
    """A name in the PDDL that the package's own code reads back as "sinkbasin 1" or "drawer 2"."""
    return f"{kind[:-5]}_bar_{number}_bar_{kind}" if kind.endswith("Basin") else f"{kind}_bar_{number}"


@cache
def goals(number: int, type_: str) -> tuple[tuple[str, str], ...]:
    """The pairs (thing, target) of a task type that make sense in a room; the target is a lamp for "look"."""
    here, knows = room(number), _knowledge()
    kinds = sorted({r.kind for r in here.receptacles})
    things = [thing for thing in here.things if thing != LAMP]
    if type_ == TYPES[1]:
        return tuple((thing, LAMP) for thing in things) if LAMP in here.things else ()
    if type_ in APPLIANCES:
        if APPLIANCES[type_] not in kinds:
            return ()
        things = [thing for thing in things if thing in knows.actions[PROPERTIES[type_]]]
    return tuple(
        (thing, kind)
        for thing in things
        for kind in kinds
        if thing in knows.fits.get(kind, ())
        and kind != APPLIANCES.get(type_)
        and any(place.kind != kind for place in here.places(thing))
    )


def split_of(number: int, type_: str, thing: str, target: str) -> str:
    """The split that a goal in a room belongs to: unseen rooms, an eighth of the goals of the others, the rest."""
    if number in UNSEEN_ROOMS:
        return "valid_unseen"
    digest = hashlib.sha256(f"{number} {type_} {thing} {target}".encode()).digest()
    return "valid_seen" if digest[0] < 32 else "train"


def draw_tasks(split: str, count: int, types: Sequence[str], seed: int) -> list[Task]:
    """Tasks with as many of each type as of the others, spread over the rooms."""
    chosen = Random(f"alfworld {split} {seed}")
    choices = {
        type_: [
            (number, pairs)
            for number in ROOMS
            if (pairs := [p for p in goals(number, type_) if split_of(number, type_, *p) == split])
        ]
        for type_ in types
    }
    tasks: list[Task] = []
    for i in range(count):
        type_ = types[i % len(types)]
        number, pairs = chosen.choice(choices[type_])
        thing, target = chosen.choice(pairs)
        tasks.append(
            {
                "id": f"{split}-{seed}-{i}",
                "type": type_,
                "room": number,
                "object": thing,
                "target": target,
                "layout_seed": chosen.getrandbits(32),
            }
        )
    return tasks


def make_game(task: Task) -> dict[str, Any]:
    """The game of a drawn task, as the engine loads it."""
    folder, knows = package_folder() / "data", _knowledge()
    words = {k: str(task[v]).lower() for k, v in {"obj": "object", "recep": "target", "toggle": "target"}.items()}
    templates = knows.goals[task["type"]]["templates"]
    goal = Random(task["layout_seed"]).choice(templates).format(**words, mrecep="")
    return {
        "pddl_domain": (folder / "alfred.pddl").read_text(),
        "grammar": (folder / "alfred.twl2").read_text().replace("UNKNOWN GOAL", goal),
        "pddl_problem": _problem(task),
        "walkthrough": None,
        "solvable": True,
    }


def _layout(task: Task) -> dict[str, tuple[str, Receptacle]]:
    """Name of each thing -> its kind and where it lies. Nothing asked for lies at its target."""
    drawn, here = Random(task["layout_seed"]), room(task["room"])
    layout = {}
    for kind in here.things:
        places = here.places(kind)
        count = 1 if kind == LAMP else drawn.randint(1, 2)
        if kind == task["object"]:
            places = tuple(p for p in places if p.kind != task["target"])
            count = 2 if task["type"] == TYPES[5] else count
        for number in range(1, count + 1):
            layout[_name(kind, number)] = (kind, drawn.choice(places))
    return layout


def _problem(task: Task) -> str:
    here, knows, layout = room(task["room"]), _knowledge(), _layout(task)
    # The rules name these types, so they have to exist.
    things = sorted({kind for kind, _ in layout.values()} | {"Knife", "ButterKnife"})
    kinds = sorted({r.kind for r in here.receptacles} | set(APPLIANCES.values()))
    start = "loc_bar_start"
    objects = ["agent1 - agent", f"{start} - location"]
    objects += [f"{location} - location" for location in sorted({r.location for r in here.receptacles})]
    objects += [f"{r.name} - receptacle" for r in here.receptacles] + [f"{name} - object" for name in layout]
    objects += [f"{kind}Type - otype" for kind in things] + [f"{kind}Type - rtype" for kind in kinds]
    facts = [f"atLocation agent1 {start}"]
    for r in here.receptacles:
        facts += [f"receptacleAtLocation {r.name} {r.location}", f"receptacleType {r.name} {r.kind}Type"]
        facts += [f"openable {r.name}"] * (r.kind in knows.openable)
    for name, (kind, place) in layout.items():
        facts += [f"objectType {name} {kind}Type", f"inReceptacle {name} {place.name}"]
        facts += [f"objectAtLocation {name} {place.location}"]
        facts.append(f"{'toggleable' if kind == LAMP else 'pickupable'} {name}")
        facts += [
            f"{action.lower()} {name}"
            for action, able in sorted(knows.actions.items())
            if kind in able and action != "Toggleable"
        ]
    facts += [f"canContain {r}Type {o}Type" for r in kinds for o in things if o in knows.fits.get(r, ())]
    goal = knows.goals[task["type"]]["pddl"].replace("#", "-")
    goal = goal.format(obj=task["object"], recep=task["target"], toggle=task["target"])
    init = "\n".join(f"({fact})" for fact in facts)
    # The goal's text closes the bracket of "define".
    return f"(define (problem game)\n(:domain alfred)\n(:objects\n{chr(10).join(objects)}\n)\n(:init\n{init}\n)\n{goal}"
