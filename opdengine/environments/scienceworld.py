"""ScienceWorld (Wang et al., arXiv 2203.07540): 30 types of elementary-school experiments in text.

The simulator is a Java program in its Python package; each environment runs one, which ends with it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from opdengine.environments.commands import CommandEnvironment, CommandOptions, View, need, optional
from opdengine.environments.demonstration import SCIENCEWORLD
from opdengine.environments.java import find_java, java_first
from opdengine.environments.protocol import InfrastructureError, Task

VARIATIONS = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
"""Types of tasks and how many variations the simulator has of each."""
SPLITS = ("train", "dev", "test")
SIMPLIFICATIONS = (
    "easy",
    "teleportAction",
    "selfWateringFlowerPots",
    "openContainers",
    "openDoors",
    "noElectricalAction",
)
STEADY = ("-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2")
"""Makes a JVM give all objects the same hash. The simulator walks through sets of objects, and what it says
would otherwise depend on everything that its JVM did before."""
CLOSE_SECONDS = 5.0

REFUSALS = re.compile(
    r"No known action matches|Ambiguous request|Unknown action|I'm not sure (what|how)|It'?s not clear how"
    r"|(You|That|Something) can't |You must disconnect|Connections must specify|There is only one thing"
    r"|There is nothing in the|That object (does not appear|already appears)|That is already flushing"
    r"|The [^.\n]*( is not (open|closeable|mov|edible|a container|something that can be activated)"
    r"|isn't open| is already (open|closed|activated|deactivated|connected)|appears broken| is empty, so"
    r"|does not contain any liquids|doesn't appear to go anywhere|can't be poured| aren't able to move)"
)
"""The simulator's answer begins like this where it did not do what it was told."""

RULES = """You do a science experiment in a house with several rooms and a garden. Each turn you give one command and
read what comes of it. Focus only on what the task names: to focus on anything else ends the experiment in failure.
If a command could mean several things you are given a list; then answer with a number of it as the command.

Commands:
look around, inventory, task
look at THING, look in THING, read THING
open THING, close THING, activate THING, deactivate THING, flush THING
go to ROOM{teleport}
pick up THING, put down THING, move THING to THING
pour THING in THING, dunk THING in THING, mix THING
use THING on THING, eat THING, focus on THING{connect}
wait (ten steps of time), wait1 (one step of time)"""


@dataclass(frozen=True)
class ScienceWorldOptions(CommandOptions):
    """Options of :class:`ScienceWorld`, beside those of :class:`CommandOptions`.

    Hundreds of commands work at any time, so none are listed unless ``admissible`` says how many.

    Args:
        types: the task types to draw from, in turn.
        demonstration: the instructions end with a played task as an example.
        inventory: every observation ends with what the agent carries, in the simulator's words.
        variations: at most this many of each type; 0 takes all of the split.
        simplifications: "easy" (all that leave the task possible), "" or some of
            "teleportAction,selfWateringFlowerPots,openContainers,openDoors,noElectricalAction".
        memory_mb: the JVM's heap; the whole process needs about 150 MB more.
    """

    admissible: int = 0
    types: Sequence[str] = tuple(VARIATIONS)
    demonstration: bool = True
    inventory: bool = True
    variations: int = 0
    simplifications: str = "easy"
    memory_mb: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        need(bool(self.types) and set(self.types) <= set(VARIATIONS), "types", self.types, f"some of {[*VARIATIONS]}")
        need(self.variations >= 0, "variations", self.variations, "0 or positive")
        need(self.memory_mb >= 256, "memory_mb", self.memory_mb, "256 or more")
        names = [name for name in self.simplifications.split(",") if name]
        need(set(names) <= set(SIMPLIFICATIONS), "simplifications", self.simplifications, f"some of {SIMPLIFICATIONS}")


class ScienceWorld(CommandEnvironment):
    """The environment; see :class:`ScienceWorldOptions`.

    ``info["raw_score"]`` is the simulator's own score: -100 for a failed experiment, else 0 to 100.

    Raises:
        ImportError: ScienceWorld is missing.
        ValueError: there is no Java; says how to get it.
        InfrastructureError: the simulator does not start.
    """

    name = "scienceworld"
    option_class = ScienceWorldOptions

    def __init__(self, **options: Any) -> None:
        self._engine: Any = None
        self.options: ScienceWorldOptions = ScienceWorldOptions(**options)
        simulator = optional("scienceworld", "scienceworld").ScienceWorldEnv
        flags = (*STEADY, f"-Xmx{self.options.memory_mb}m", "-XX:+UseSerialGC", "-XX:-UsePerfData")
        java = find_java(flags)
        try:
            with java_first(java, flags):
                self._engine = simulator("", envStepLimit=1 << 30)
        except (OSError, ValueError) as error:  # no port number from a JVM that has ended
            raise InfrastructureError(f"scienceworld: the simulator does not start with {java}: {error}") from error

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """Tasks of the simulator's own splits "train", "dev" or "test", the types in turn.

        Raises:
            ValueError: the split is unknown, or there is no Java to play them with.
        """
        need(split in SPLITS, "split", split, f"one of {SPLITS}")
        wanted = ScienceWorldOptions(**options)
        find_java(STEADY)
        drawn = Random(f"scienceworld {split} {wanted.task_seed}")
        columns = []
        for type_ in wanted.types:
            numbers = list(variations_of(type_, split))
            drawn.shuffle(numbers)
            columns.append([(type_, number) for number in numbers[: wanted.variations or None]])
        rows = range(max(map(len, columns)))
        cells = [column[row] for row in rows for column in columns if row < len(column)]
        return [{"id": f"{type_}-{v}", "type": type_, "variation": v} for type_, v in cells[: wanted.count or None]]

    def _begin(self, task: Task) -> tuple[str, View]:
        if self._engine is None:
            raise InfrastructureError("scienceworld: it was closed")
        self._task, self._done = task, list[str]()
        self._way: list[str] | None = None
        text, info = self._load(gold=False)
        commands = self._engine.get_possible_actions()
        self.rules = RULES.format(
            teleport=", teleport to ROOM" if any(c.startswith("teleport") for c in commands) else "",
            connect=", connect THING to THING, disconnect THING" if "connect OBJ to OBJ" in commands else "",
        )
        if self.options.demonstration:
            held = {"one": "an orange", "both": "a dove egg\n\tan orange"} if self.options.inventory else {}
            told = {name: f"\nIn your inventory, you see:\n\t{things}" for name, things in held.items()}
            self.demonstration = SCIENCEWORLD.shown(self.options.format, **{"one": "", "both": "", **told})
        goal = " ".join(info["taskDesc"].removeprefix("Task Description:").split())
        return goal.removeprefix("Your task is to "), self._show(text, False, info)

    def _load(self, *, gold: bool) -> tuple[str, dict[str, Any]]:
        task = self._task
        self._engine.load(task["type"], task["variation"], self.options.simplifications, generateGoldPath=gold)
        text, info = self._engine.reset()
        return text, info

    def _execute(self, command: str) -> View:
        text, _, ended, info = self._engine.step(command)
        self._done.append(command)
        return self._show(text, bool(ended), info)

    def _show(self, text: str, ended: bool, info: dict[str, Any]) -> View:
        raw = int(info["score"])
        carried = f"\n{info['inv'].strip()}" if self.options.inventory else ""
        return View(
            observation=text.strip() + carried,
            admissible=sorted(set(info["valid"]) - {""}),
            score=max(raw, 0) / 100,
            ended=ended,
            success=raw == 100,
            refused=REFUSALS.match(text) is not None,
            info={"raw_score": raw},
        )

    def _gold(self) -> str:
        """Return the simulator's own solution, which is known from the start of the episode only."""
        if self._way is None:
            self._load(gold=True)
            self._way = list(self._engine.get_gold_action_sequence())
            for command in self._done:
                self._engine.step(command)
        if self._done != self._way[: len(self._done)] or len(self._done) == len(self._way):
            raise InfrastructureError("scienceworld: the episode has left its gold path; reset it first")
        return self._way[len(self._done)]

    def close(self) -> None:
        """End the JVM."""
        engine, self._engine, self._view = self._engine, None, None
        if engine is None:
            return
        with contextlib.suppress(Exception):  # a JVM that has died cannot say goodbye
            engine.close()
        jvm: subprocess.Popen[bytes] = engine._gateway.java_process
        try:
            jvm.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            jvm.kill()
            jvm.wait()


def variations_of(type_: str, split: str) -> range:
    """The variations of a split: half of them to train, a quarter each for dev and test, in order."""
    most = VARIATIONS[type_]
    quarter = most // 4
    return {
        "train": range(2 * quarter),
        "dev": range(2 * quarter, 3 * quarter),
        "test": range(3 * quarter, most),
    }[split]
