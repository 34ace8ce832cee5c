"""A played task as an example in the instructions (one-shot prompts, as in SAGE-OPD, arXiv 2606.19659, appendix C)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Demonstration:
    """One task from its beginning to its success.

    Args:
        goal: in words.
        steps: (what the agent sees, its thought, its command), in order.
        end: what it sees at last.
    """

    goal: str
    steps: Sequence[tuple[str, str, str]]
    end: str

    def shown(self, format: str, **names: str) -> str:
        """The example in the format of the answers.

        Args:
            format: "react" (lines ``Thought:`` and ``Action:``) or "action" (the command alone).
            names: in place of ``{name}`` in what is seen and in commands.
        """
        lines = ["Here is an example with another task.", ""]
        for number, (seen, thought, command) in enumerate(self.steps):
            seen, written = seen.format(**names), command.format(**names)
            lines.append(f"Observation: {seen}" if number else f"{seen}\n\nYour task: {self.goal}")
            lines.append(f"Thought: {thought}\nAction: {written}" if format == "react" else written)
        return "\n".join([*lines, f"Observation: {self.end.format(**names)}"])


ALFWORLD = Demonstration(
    goal="put a clean spatula in drawer.",
    steps=(
        (
            "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a countertop 1, a "
            "drawer 1, a fridge 1, and a sinkbasin 1.",
            "I need a spatula first. A countertop is a likely place.",
            "go to countertop 1",
        ),
        (
            "You arrive at countertop 1. On the countertop 1, you see a knife 1, a spatula 2, and a tomato 1.",
            "Here is spatula 2. I take it.",
            "take spatula 2 from countertop 1",
        ),
        (
            "You pick up the spatula 2 from the countertop 1.",
            "It has to be clean, so I go to the sinkbasin.",
            "go to sinkbasin 1",
        ),
        (
            "You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.",
            "Now I clean it.",
            "clean spatula 2 with sinkbasin 1",
        ),
        (
            "You clean the spatula 2 using the sinkbasin 1.",
            "The clean spatula belongs in a drawer.",
            "go to drawer 1",
        ),
        (
            "You arrive at drawer 1. The drawer 1 is closed.",
            "The drawer is closed, so I open it first.",
            "open drawer 1",
        ),
        (
            "You open the drawer 1. The drawer 1 is open. In it, you see nothing.",
            "I put the spatula in.",
            "{put}",
        ),
    ),
    end="You {done}.",
)
"""``{put}`` is the last command in the words of the game's version, ``{done}`` what the game says of it."""

SCIENCEWORLD = Demonstration(
    goal="find a(n) animal. First, focus on the thing. Then, move it to the yellow box in the living room.",
    steps=(
        (
            "This room is called the living room. In it, you see:\n\tthe agent\n\ta substance called air\n\ta couch\n"
            "\ta yellow box (containing nothing)\nYou also see:\n\tA door to the hallway (that is open){one}",
            "There is no animal here. Animals may be outside, which is reached through the hallway.",
            "go to hallway",
        ),
        ("You move to the hallway.{one}", "The way outside leads through the greenhouse.", "go to greenhouse"),
        ("You move to the greenhouse.{one}", "One more door.", "go to outside"),
        ("You move to the outside.{one}", "Now I look for an animal.", "look around"),
        (
            "This outside location is called the outside. Here you see:\n\tthe agent\n\ta substance called air\n"
            "\ta dove egg\n\ta fire pit (containing nothing)\nYou also see:\n\tA door to the greenhouse (that is open)"
            "{one}",
            "The dove egg is an animal in its first stage. I focus on it, as the task says.",
            "focus on dove egg",
        ),
        ("You focus on the dove egg.{one}", "I take it along.", "pick up dove egg"),
        ("You move the dove to the inventory.{both}", "Back the way I came.", "go to greenhouse"),
        ("You move to the greenhouse.{both}", "On to the hallway.", "go to hallway"),
        ("You move to the hallway.{both}", "The box is in the living room.", "go to living room"),
        ("You move to the living room.{both}", "I put the animal into the box.", "move dove egg to yellow box"),
    ),
    end="You move the dove to the yellow box.{one}",
)
"""``{one}`` and ``{both}`` tell the inventory, without and with the egg, or nothing."""
