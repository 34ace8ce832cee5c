"""ALFWorld (Shridhar et al., arXiv 2010.03768): household tasks in text, in the benchmark's own engine.

Without ``data_dir`` games are generated (:mod:`opdengine.environments.alfworld_games`): good to train and to
compare methods with each other, not comparable with published numbers. With it the official games are
played.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdengine.environments.alfworld_expert import Expert
from opdengine.environments.alfworld_games import SPLITS, TYPES, draw_tasks, make_game, package_folder
from opdengine.environments.commands import CommandEnvironment, CommandOptions, View, need, optional
from opdengine.environments.demonstration import ALFWORLD
from opdengine.environments.protocol import Task

REFUSED = "Nothing happens."
PUT, OLD_PUT = "move {thing} to {place}", "put {thing} in/on {place}"
"""The command since version 0.4 of the games, and before."""
RULES = """You act in a household and have one task. Each turn you give one command and read what comes of it.
You can see and reach only what is at the place where you stand; what is shut has to be opened first, and you can
carry one thing at a time. Names carry numbers ("drawer 2"); use them exactly as you read them.

Commands:
go to PLACE
open PLACE
close PLACE
take THING from PLACE
{put}
clean THING with SINKBASIN
heat THING with MICROWAVE
cool THING with FRIDGE
use LAMP
examine THING or PLACE
inventory
look"""


@dataclass(frozen=True)
class ALFWorldOptions(CommandOptions):
    """Options of :class:`ALFWorld`, beside those of :class:`CommandOptions`.

    Args:
        types: the task types to draw from, equally often.
        demonstration: the instructions end with a played task as an example.
        data_dir: folder of the official games (``json_2.1.1`` or the folder that holds it, with
            ``SPLIT/*/*/game.tw-pddl`` beside ``traj_data.json``); empty: games are generated.
    """

    types: Sequence[str] = TYPES
    demonstration: bool = True
    data_dir: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        need(bool(self.types) and set(self.types) <= set(TYPES), "types", self.types, f"some of {TYPES}")


class ALFWorld(CommandEnvironment):
    """The environment; see :class:`ALFWorldOptions`.

    Raises:
        ImportError: ALFWorld or TextWorld is missing.
    """

    name = "alfworld"
    option_class = ALFWorldOptions

    def __init__(self, **options: Any) -> None:
        self.options: ALFWorldOptions = ALFWorldOptions(**options)
        package_folder()
        textworld = optional("textworld", "alfworld")
        engine = optional("textworld.envs", "alfworld").PddlEnv
        self._downward = optional("fast_downward", "alfworld")
        names = optional("alfworld.agents.environment.alfred_tw_env", "alfworld").AlfredDemangler
        self._engine = names(engine(textworld.EnvInfos(admissible_commands=True, facts=True)))
        self._loaded: Any = None
        self._closed = False

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """Tasks of "train", "valid_seen" (rooms of train, other goals) or "valid_unseen" (other rooms).

        Raises:
            ValueError: the split is unknown, or ``data_dir`` holds no games of it.
        """
        need(split in SPLITS, "split", split, f"one of {tuple(SPLITS)}")
        wanted = ALFWorldOptions(**options)
        if wanted.data_dir:
            return official_tasks(wanted.data_dir, split, wanted.types)[: wanted.count or None]
        return draw_tasks(split, wanted.count or SPLITS[split], tuple(wanted.types), wanted.task_seed)

    def _begin(self, task: Task) -> tuple[str, View]:
        self._task = task
        with self._one_translation():
            if self._loaded != dict(task):
                self._loaded = None
                self._engine.load(task["game"] if "game" in task else make_game(task))
                self._loaded = dict(task)
            state = self._engine.reset()
        self._put = PUT if PUT.format(thing="{o}", place="{r}") in state["command_templates"] else OLD_PUT
        self.rules = RULES.format(put=self._put.format(thing="THING", place="PLACE"))
        if self.options.demonstration:
            put = self._put.format(thing="spatula 2", place="drawer 1")
            done = self._put.format(thing="the spatula 2", place="the drawer 1")
            self.demonstration = ALFWORLD.shown(self.options.format, put=put, done=done)
        room, _, goal = state.feedback.partition("Your task is to: ")
        room = room.replace("-= Welcome to TextWorld, ALFRED! =-", "").strip()
        return goal.strip(), self._show(state, room)

    def _execute(self, command: str) -> View:
        state, _, _ = self._engine.step(command)
        return self._show(state, state.feedback.strip())

    def _show(self, state: Any, text: str) -> View:
        self._facts = state.facts
        won = bool(state["won"])
        # Where one can go is known from the start; what can be done here is told first.
        commands = sorted(state["admissible_commands"], key=lambda c: (c.startswith("go to "), " " not in c, c))
        return View(text, commands, float(won), won, won, refused=text == REFUSED)

    def _gold(self) -> str:
        task = self._task
        return Expert(self._facts, task["type"], task["object"], task["target"], self._put).command()

    def close(self) -> None:
        """Let the engine's library free what it holds; unloading it with others in use would crash."""
        if not self._closed:
            self._closed = True
            self._view = None
            self._engine.unwrapped.downward_lib.cleanup()

    @contextmanager
    def _one_translation(self) -> Iterator[None]:
        """Translate a problem once in place of four times, which is most of the time of a reset.

        The engine translates when it loads and when it resets, and each time again in a form that only its
        planner needs, which is not used here.
        """
        translate = self._downward.pddl2sas

        def once(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> Any:
            if self._translated[0] != (domain, problem):
                self._translated = ((domain, problem), translate(domain, problem, verbose=verbose))
            return self._translated[1]

        self._downward.pddl2sas = once
        try:
            yield
        finally:
            self._downward.pddl2sas = translate

    _translated: tuple[Any, Any] = (None, None)


def official_tasks(data_dir: str, split: str, types: Sequence[str]) -> list[Task]:
    """The official games of a split that the benchmark plays: solvable, nothing sliced, no movable receptacles.

    Raises:
        ValueError: there are none; says where they were looked for and how to get them.
    """
    given = Path(data_dir).expanduser()
    roots = [given, *sorted(given.glob("json_2*"), reverse=True)]
    root = next((folder for folder in roots if (folder / split).is_dir()), given)
    tasks: list[Task] = []
    for file in sorted((root / split).glob("**/traj_data.json")):
        game = file.with_name("game.tw-pddl")
        name = file.parent.relative_to(root).as_posix()
        if "movable" in name or "Sliced" in name or not game.is_file():
            continue
        try:
            about = json.loads(file.read_text())
            solvable = json.loads(game.read_text()).get("solvable")
            goal: Mapping[str, str] = about["pddl_params"]
            target = goal["toggle_target"] or goal["parent_target"]
            task = {"id": name, "type": about["task_type"], "object": goal["object_target"], "target": target}
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file.parent}: not a game of ALFWorld: {error!r}; download it again") from error
        if solvable and task["type"] in types:
            tasks.append({**task, "game": str(game)})
    if not tasks:
        raise ValueError(
            f"data_dir={data_dir!r} holds no games of {split!r} (looked for {root / split}/*/*/game.tw-pddl beside "
            "traj_data.json); get them with `alfworld-download`, or leave data_dir empty to generate games"
        )
    return tasks
