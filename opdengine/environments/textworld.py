"""TextWorld (Côté et al., arXiv 1806.11532): generated games of rooms, containers and keys.

Games are made from seeds and played by TextWorld's own logic in Python. That logic has no prose (it would
take a compiled game), so what the player sees is told here from the true state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from opdengine.environments.commands import CommandEnvironment, CommandOptions, View, need, optional
from opdengine.environments.protocol import InfrastructureError, Task
from opdengine.environments.textworld_prose import World

SPLITS = ("train", "valid", "test")
DEFAULT_COUNT = {"train": 1000, "valid": 100, "test": 100}
ATTEMPTS = 20
"""Seeds to try for one game: not every map has room for every quest."""
RULES = """You explore a few rooms and have one quest. Each turn you give one command and read what comes of it.
What is shut has to be opened first, and what is locked needs its key.

Commands:
look
inventory
examine THING
go north, go south, go east, go west
take THING, take THING from PLACE
drop THING
put THING on SUPPORT
insert THING into CONTAINER
open or close DOOR OR CONTAINER
unlock or lock DOOR OR CONTAINER with KEY
eat FOOD"""


@dataclass(frozen=True)
class TextWorldOptions(CommandOptions):
    """Options of :class:`TextWorld`, beside those of :class:`CommandOptions`.

    Args:
        nb_rooms: rooms of a game.
        nb_objects: things in it, at least; a quest may need more.
        quest_length: commands on the shortest way to success.
        last_step_only: the quest names its last step alone, not the whole way.
    """

    nb_rooms: int = 3
    nb_objects: int = 6
    quest_length: int = 3
    last_step_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("nb_rooms", 20), ("nb_objects", 50), ("quest_length", 10)):
            need(1 <= getattr(self, name) <= most, name, getattr(self, name), f"1 to {most}")


class TextWorld(CommandEnvironment):
    """The environment; see :class:`TextWorldOptions`.

    Raises:
        ImportError: TextWorld is missing.
    """

    name = "textworld"
    option_class = TextWorldOptions
    rules = RULES

    def __init__(self, **options: Any) -> None:
        self.options: TextWorldOptions = TextWorldOptions(**options)
        textworld = optional("textworld", "textworld")
        wanted = textworld.EnvInfos(admissible_commands=True, policy_commands=True, facts=True)
        self._engine = optional("textworld.envs", "textworld").TextWorldEnv(wanted)
        self._generator = optional("textworld.generator", "textworld")

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """Tasks of "train", "valid" or "test"; no seed occurs in two of them.

        Raises:
            ValueError: the split is unknown.
        """
        need(split in SPLITS, "split", split, f"one of {SPLITS}")
        wanted = TextWorldOptions(**options)
        drawn = Random(f"textworld {split} {wanted.task_seed}")
        count = wanted.count or DEFAULT_COUNT[split]
        seeds = [3 * seed + SPLITS.index(split) for seed in drawn.sample(range(1 << 20), count)]
        size = {name: getattr(wanted, name) for name in ("nb_rooms", "nb_objects", "quest_length", "last_step_only")}
        return [{"id": f"{split}-{seed}", "type": "quest", "game_seed": seed, **size} for seed in seeds]

    def _begin(self, task: Task) -> tuple[str, View]:
        game = self._make_game(task)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "game.json"
            game.save(str(file))
            self._engine.load(str(file))
        state = self._engine.reset()
        self._best = max(int(state["max_score"]), 1)
        return " ".join(state["objective"].split()), self._show(state, World(state["facts"]).here())

    def _make_game(self, task: Task) -> Any:
        options = self._generator.GameOptions()
        options.nb_rooms, options.nb_objects = task["nb_rooms"], task["nb_objects"]
        options.quest_length = task["quest_length"]
        options.grammar.only_last_action = task["last_step_only"]
        for attempt in range(ATTEMPTS):
            options.seeds = task["game_seed"] + 3 * attempt * (1 << 20)
            try:
                return self._generator.make_game(options)
            except self._generator.QuestGenerationError as error:
                problem = error
        raise InfrastructureError(
            f"textworld: no quest of quest_length={task['quest_length']} in nb_rooms={task['nb_rooms']} with "
            f"nb_objects={task['nb_objects']} after {ATTEMPTS} attempts; make the game larger ({problem})"
        )

    def _execute(self, command: str) -> View:
        state, _, _ = self._engine.step(command)
        refused = state["feedback"] == "Invalid command."
        text = "That does not work here." if refused else World(state["facts"]).tell(command)
        return self._show(state, text, refused=refused)

    def _show(self, state: Any, text: str, *, refused: bool = False) -> View:
        self._way = state["policy_commands"]
        won, lost = bool(state["won"]), bool(state["lost"])
        score = min(max((state.get("score") or 0) / self._best, 0.0), 1.0)
        # What changes the world is told before what only looks at it.
        commands = sorted(state["admissible_commands"], key=lambda c: (c.startswith("examine "), " " not in c, c))
        return View(text, commands, score, won or lost, won, refused)

    def _gold(self) -> str:
        if not self._way:
            raise InfrastructureError("textworld: there is no way to success from here any more")
        return str(self._way[0])
