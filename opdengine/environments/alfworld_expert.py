"""The next command on a way to success in ALFWorld, from the true state of the world."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from opdengine.environments.alfworld_games import APPLIANCES, TYPES
from opdengine.environments.protocol import InfrastructureError

VERBS = {TYPES[2]: ("clean", "isclean"), TYPES[3]: ("heat", "ishot"), TYPES[4]: ("cool", "iscool")}


class Expert:
    """Knows where everything is.

    Args:
        facts: propositions of the engine, with the names that the commands use.
        type_: of the task.
        thing: kind of the thing that is asked for.
        target: kind of the receptacle that it goes to, or of the lamp.
        put: the command for putting a thing to a place, with ``{thing}`` and ``{place}``.
    """

    def __init__(self, facts: Iterable[Any], type_: str, thing: str, target: str, put: str) -> None:
        self._facts: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for fact in sorted(facts, key=str):
            self._facts[fact.name].append(tuple(argument.name.strip() for argument in fact.arguments))
        self._type, self._thing, self._target = type_, f"{thing}Type".lower(), f"{target}Type".lower()
        self._put_command = put
        self._here = self._facts["atlocation"][0][1]
        self._at = self._pairs("receptacleatlocation")
        self._inside = self._pairs("inreceptacle")
        self._kind = self._pairs("objecttype")
        self._receptacle_kind = self._pairs("receptacletype")

    def _pairs(self, name: str) -> dict[str, str]:
        return {first: second for first, second in self._facts[name]}

    def command(self) -> str:
        """
        Raises:
            InfrastructureError: what the task needs is not in this world.
        """
        held = next((thing for _, thing in self._facts["holds"]), None)
        if held is None:
            return self._take()
        if self._kind[held] != self._thing:
            return self._put(held, lambda place: (self._receptacle_kind[place], self._kind[held]) in self._fits())
        if self._type == TYPES[1]:
            lamp = self._first(t for t in self._inside if self._kind[t] == self._target)
            return self._at_place(self._inside[lamp]) or f"use {lamp}"
        if self._lacks(held):
            appliance = self._nearest(f"{APPLIANCES[self._type]}Type".lower())
            return self._at_place(appliance) or f"{VERBS[self._type][0]} {held} with {appliance}"
        goal = self._goal_place()
        return self._put(held, lambda place: place == goal)

    def _take(self) -> str:
        done = self._goal_place() if self._type != TYPES[1] else ""
        wanted = [t for t, place in self._inside.items() if self._kind[t] == self._thing]
        open_ones = [t for t in wanted if self._inside[t] != done or self._lacks(t)]
        thing = self._first(sorted(open_ones, key=lambda t: (self._lacks(t), self._away(self._inside[t]), t)))
        place = self._inside[thing]
        return self._at_place(place) or self._opened(place) or f"take {thing} from {place}"

    def _put(self, thing: str, may: Callable[[str], bool]) -> str:
        place = self._first(sorted(filter(may, self._at), key=lambda place: (self._away(place), place)))
        return self._at_place(place) or self._opened(place) or self._put_command.format(thing=thing, place=place)

    def _goal_place(self) -> str:
        """The receptacle to put things into: the one that already holds most of them."""
        places = [place for place, kind in self._receptacle_kind.items() if kind == self._target]
        held = [self._inside.get(t) for t, kind in self._kind.items() if kind == self._thing]
        return self._first(sorted(places, key=lambda place: (-held.count(place), self._away(place), place)))

    def _lacks(self, thing: str) -> bool:
        """Whether it still has to be cleaned, heated or cooled."""
        return self._type in VERBS and (thing,) not in self._facts[VERBS[self._type][1]]

    def _fits(self) -> set[tuple[str, ...]]:
        return set(self._facts["cancontain"])

    def _nearest(self, kind: str) -> str:
        places = [place for place, k in self._receptacle_kind.items() if k == kind]
        return self._first(sorted(places, key=lambda place: (self._away(place), place)))

    def _away(self, place: str) -> bool:
        return self._at[place] != self._here

    def _at_place(self, place: str) -> str:
        return f"go to {place}" if self._away(place) else ""

    def _opened(self, place: str) -> str:
        shut = (place,) in self._facts["openable"] and (place,) not in self._facts["opened"]
        return f"open {place}" if shut else ""

    def _first(self, names: Iterable[str]) -> str:
        name = next(iter(names), None)
        if name is None:
            raise InfrastructureError(f"alfworld: no way to success in this world ({self._type}, {self._thing})")
        return name
