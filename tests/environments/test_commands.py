"""The chat around an engine of text commands, with an engine of three lines."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
from envs_helpers import play_odd_messages, say

from opdengine.environments import Environment, HasExpert, InfrastructureError, load_environment
from opdengine.environments.actions import react_action
from opdengine.environments.commands import LONGEST_COMMAND, CommandEnvironment, CommandOptions, View
from opdengine.environments.demonstration import ALFWORLD, SCIENCEWORLD, Demonstration


class Counter(CommandEnvironment):
    """Count to three."""

    name = "counter"
    rules = "Say the next number."

    def __init__(self, **options):
        self.options = CommandOptions(**options)
        self.heard = []

    @classmethod
    def tasks(cls, split, **options):
        return [{"id": "a", "type": "count"}]

    def _begin(self, task):
        if task["id"] == "broken":
            raise KeyError("no such task")
        if task["id"] == "exits":
            raise SystemExit(3)
        self.number = 0
        return "count to three", self._view_of("You begin.")

    def _execute(self, command):
        self.heard.append(command)
        if command != self._gold():
            return self._view_of("Wrong.", refused=True)
        self.number += 1
        return self._view_of(command)

    def _gold(self):
        return f"say {self.number + 1}"

    def _view_of(self, text, refused=False):
        over = self.number == 3
        known = [f"say {i}" for i in range(1, 8)]
        return View(text, known, self.number / 3, over, over, refused, {"number": self.number})


def begin(task="a", **options):
    world = Counter(**options)
    return world, world.reset(seed=0, task={"id": task, "type": "count"})


def test_it_is_an_environment_with_an_expert():
    assert isinstance(Counter(), Environment) and isinstance(Counter(), HasExpert)


def test_rewards_add_up_to_the_score():
    world, start = begin()
    assert start.info["goal"] == "count to three" and start.info["type"] == "count"
    steps = [world.step(world.expert()) for _ in range(3)]
    assert sum(step.reward for step in steps) == pytest.approx(1) and steps[0].reward == pytest.approx(1 / 3)
    assert [step.terminated for step in steps] == [False, False, True]
    assert "success" not in steps[1].info and steps[1].info["score"] == pytest.approx(2 / 3)
    assert steps[2].info["success"] is True and steps[2].info["score"] == 1 and steps[2].info["number"] == 3
    with pytest.raises(RuntimeError, match="reset"):
        world.step(say("look"))


def test_commands_are_listed_up_to_a_number_and_the_rest_counted():
    world, start = begin(admissible=2)
    assert start.messages[-1]["content"].endswith("Commands that work now: say 1, say 2 (+5 more)")
    assert len(start.info["admissible"]) == 7
    assert "(+5 more)" in world.step(say("say 1")).messages[0]["content"]
    _, start = begin(admissible=7)
    assert start.messages[-1]["content"].endswith("say 7")
    world, start = begin(admissible=0)
    assert "say 1" not in start.messages[-1]["content"] + world.step(say("look")).messages[0]["content"]


def test_messages_without_a_command_cost_a_turn_and_never_reach_the_engine():
    world, _ = begin()
    play_odd_messages(world)
    assert all(len(command) <= LONGEST_COMMAND and "\n" not in command for command in world.heard)
    step = world.step({"role": "assistant", "content": "say 1"})
    assert step.info["failure"] == "unparseable" and "Thought: a short thought" in step.messages[0]["content"]
    assert world.number == 0 and "say 1" not in world.heard


@pytest.mark.parametrize(
    ("content", "failure"),
    [
        ("", "empty"),
        ("hello", "unparseable"),
        ("Action: " + "x" * (LONGEST_COMMAND + 1), "invalid_action"),
        ("Action: " + "x" * LONGEST_COMMAND, "execution"),
        ("Thought: one\nAction: say 1", ""),
    ],
)
def test_failures_have_their_words(content, failure):
    world, _ = begin()
    step = world.step({"role": "assistant", "content": content})
    assert step.info["failure"] == failure
    assert (step.info["action"] == "say 1") == (not failure)


def test_an_episode_is_cut_off_after_its_turns():
    world, _ = begin(max_turns=2)
    world.step(say("say 1"))
    step = world.step({"role": "assistant", "content": None})
    assert step.truncated and not step.terminated and step.info["success"] is False
    assert step.info["score"] == pytest.approx(1 / 3) and "Commands" not in step.messages[0]["content"]
    with pytest.raises(RuntimeError, match="reset"):
        world.step(say("say 2"))
    world.reset(seed=0, task={"id": "a"})
    assert not world.step(say("say 1")).done


def test_the_last_turn_may_still_succeed():
    world, _ = begin(max_turns=3)
    step = [world.step(world.expert()) for _ in range(3)][-1]
    assert step.terminated and not step.truncated and step.info["success"] is True


def test_plain_format_and_no_instructions():
    world, start = begin(format="action", instructions=False)
    assert [m["role"] for m in start.messages] == ["user"]
    assert world.expert()["content"] == "say 1"
    assert world.step({"role": "assistant", "content": "say 1"}).info["failure"] == ""


@pytest.mark.parametrize("task", ["broken", "exits"])
def test_a_task_that_cannot_be_set_up_is_an_infrastructure_error(task):
    with pytest.raises(InfrastructureError, match=task):
        begin(task)


@pytest.mark.parametrize("name", ["alfworld", "textworld", "scienceworld"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, name):
    def missing(module, package=None):
        raise ModuleNotFoundError(f"No module named {module!r}")

    found = load_environment(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf'pip install "opdengine\[{name}\]"'):
        found()


def test_a_demonstration_ends_the_instructions_in_the_format_of_the_answers():
    demonstration = Demonstration("count", [("You begin{dot}", "One comes first.", "say {one}")], "{one}{dot}")
    told = {form: demonstration.shown(form, one="1", dot=".") for form in ("react", "action")}
    head = "Here is an example with another task.\n\nYou begin.\n\nYour task: count\n"
    assert told["react"] == head + "Thought: One comes first.\nAction: say 1\nObservation: 1."
    assert told["action"] == head + "say 1\nObservation: 1."
    world = Counter()
    world.demonstration = told["react"]
    start = world.reset(seed=0, task={"id": "a"})
    assert start.messages[0]["content"].endswith(told["react"]) and "Observation" not in start.messages[1]["content"]
    world = Counter(instructions=False)
    world.demonstration = told["react"]
    assert [m["role"] for m in world.reset(seed=0, task={"id": "a"}).messages] == ["user"]


@pytest.mark.parametrize("demonstration", [ALFWORLD, SCIENCEWORLD])
def test_every_command_of_a_demonstration_is_read_from_its_message(demonstration):
    for _, thought, command in demonstration.steps:
        assert react_action({"role": "assistant", "content": f"Thought: {thought}\nAction: {command}"}).name == command
        assert len(command) <= LONGEST_COMMAND and "\n" not in thought
