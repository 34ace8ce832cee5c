"""The state of a TextWorld game in plain sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

DIRECTIONS = ("north", "east", "south", "west")
STATES = ("open", "closed", "locked")


class World:
    """The part of the world that can be seen.

    Args:
        facts: propositions of the engine, with the names that the commands use.
    """

    def __init__(self, facts: Iterable[Any]) -> None:
        self._facts: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        self._types: dict[str, str] = {}
        for fact in facts:
            self._facts[fact.name].add(tuple(argument.name for argument in fact.arguments))
            self._types |= {argument.name: argument.type for argument in fact.arguments}
        self._room = next(place for thing, place in self._facts["at"] if thing == "P")

    def tell(self, command: str) -> str:
        """Return what came of a command that was executed."""
        verb, _, rest = command.partition(" ")
        if verb in ("look", "go"):
            return self.here()
        if verb == "inventory":
            return self.carried()
        if verb == "examine":
            return self._about(rest)
        done = f"You {command}."
        return f"{done} {self._about(rest)}" if verb == "open" and self._types.get(rest) == "c" else done

    def here(self) -> str:
        """The room, what stands and lies in it, and the ways out."""
        things = sorted(thing for thing, place in self._facts["at"] if place == self._room and thing != "P")
        furniture = [thing for thing in things if self._types[thing] in "cs"]
        loose = [thing for thing in things if self._types[thing] not in "cs"]
        lines = [f"You are in the {self._room}.", *map(self._about, furniture)]
        if loose:
            lines.append(f"On the floor: {_list(loose)}.")
        lines.append(f"Ways out: {', '.join(self._exits()) or 'none'}.")
        return "\n".join(lines)

    def carried(self) -> str:
        """Return the things that the player holds."""
        held = sorted(thing for thing, place in self._facts["in"] if place == "I")
        return f"You carry: {_list(held)}." if held else "You carry nothing."

    def _about(self, name: str) -> str:
        kind, state = self._types.get(name), self._state(name)
        if kind == "s":
            return f"On the {name}: {_list(self._held_by('on', name))}."
        if kind == "c":
            inside = f" In it: {_list(self._held_by('in', name))}." if state == "open" else ""
            return f"The {name} is {state}.{inside}"
        if kind == "d":
            return f"The {name} is {state}."
        fits = sorted(lock for key, lock in self._facts["match"] if key == name)
        food = " You can eat it." if (name,) in self._facts["edible"] else ""
        return f"This is the {name}.{food}" + (f" It looks as if it fits the {_list(fits)}." if fits else "")

    def _exits(self) -> list[str]:
        doors = {(here, there): door for here, door, there in self._facts["link"]}
        ways = []
        for direction in DIRECTIONS:
            for there, here in sorted(self._facts[f"{direction}_of"]):
                if here == self._room:
                    door = doors.get((here, there))
                    ways.append(f"{direction} ({door}, {self._state(door)})" if door else direction)
        return ways

    def _state(self, name: str) -> str:
        return next((state for state in STATES if (name,) in self._facts[state]), "open")

    def _held_by(self, relation: str, place: str) -> list[str]:
        return sorted(thing for thing, where in self._facts[relation] if where == place)


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
