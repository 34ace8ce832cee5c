"""The house of the tiny agents: solvable, deterministic, split by content, and forgiving."""

from __future__ import annotations

import copy
from collections import Counter
from random import Random

import pytest

from opdengine.environments import FAILURES, Environment, HasExpert, load_environment
from opdengine.environments.pool import EnvironmentPool
from tiny.agents.house import HOUSE, NOTHING, SPLITS, TYPES, House


def say(text):
    return {"role": "assistant", "content": text}


def play(world, task, player, seed=0, limit=100):
    """The observation and the steps of an episode; ``player(world, last info)`` gives the messages."""
    start = world.reset(seed=seed, task=task)
    steps, info = [], start.info
    while len(steps) < limit and not (steps and steps[-1].done):
        steps.append(world.step(player(world, info)))
        info = steps[-1].info
    return start, steps


def expert(world, _):
    return world.expert()


@pytest.mark.parametrize("format_", ["action", "react", "tools"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_expert_succeeds_within_the_promised_turns(split, format_):
    world = House(format=format_)
    assert isinstance(world, Environment) and isinstance(world, HasExpert)
    tasks = House.tasks(split, count=150)
    assert Counter(task["type"] for task in tasks) == dict.fromkeys(TYPES, 50)
    for task in tasks:
        start, steps = play(world, task, expert)
        assert 4 <= len(steps) <= 12
        assert not any(step.info["failure"] for step in steps) and not any(step.reward for step in steps[:-1])
        assert steps[-1].terminated and steps[-1].reward == 1.0
        assert steps[-1].info["success"] is True and steps[-1].info["score"] == 1.0
        assert start.info["goal"] == task["goal"] and start.info["type"] == task["type"]
        assert all(len(step.info["observation"]) < 60 for step in steps)


def test_the_expert_finds_its_way_after_any_beginning():
    random, world = Random(1), House()
    for task in House.tasks("train", count=60):
        world.reset(seed=0, task=task)
        info = {"admissible": world.admissible()}
        for _ in range(random.randrange(15)):
            step = world.step(say(random.choice(info["admissible"])))
            info = step.info
            if step.done:
                break
        else:
            assert any(world.step(world.expert()).done for _ in range(30)), task


def test_the_expert_knows_only_what_it_has_seen():
    world, task = House(), House.tasks("train", count=1, types=["find"], rooms=[4, 4])[0]
    containers = task["containers"]
    hiding = next(name for name, (_, thing) in containers.items() if thing)
    start = world.reset(seed=0, task=task)
    first = world.expert()
    for other in set(containers) - {hiding}:
        moved = copy.deepcopy(task)
        moved["containers"][hiding][1], moved["containers"][other][1] = "", task["item"]
        assert world.reset(seed=0, task=moved) == start
        assert world.expert() == first


def test_splits_are_disjoint_and_unseen_layouts_are_new():
    tasks = {split: House.tasks(split, count=400) for split in SPLITS}
    ids = [task["id"] for split in tasks.values() for task in split]
    assert len(set(ids)) == len(ids)
    layouts = {s: {_layout(task) for task in split} for s, split in tasks.items()}
    assert not layouts["valid_unseen"] & (layouts["train"] | layouts["valid_seen"])
    assert tasks["train"] == House.tasks("train", count=400)
    assert tasks["train"] != House.tasks("train", count=400, world_seed=1)
    assert tasks["train"][:100] == House.tasks("train", count=100)


def _layout(task):
    return frozenset((room, exit_) for room, exits in task["exits"].items() for exit_ in exits)


def test_episodes_are_functions_of_the_task():
    world, random = House(), Random(2)
    task = House.tasks("train", count=1)[0]
    one = play(world, task, lambda w, info: say(random.choice(info["admissible"])), limit=30)
    actions = iter([step.info["action"] for step in one[1]])
    assert play(House(), task, lambda w, info: say(next(actions)), limit=len(one[1])) == one


def test_random_admissible_actions_sometimes_succeed_and_are_always_valid():
    random, world, won = Random(3), House(max_turns=16), 0
    for task in House.tasks("train", count=150):
        _, steps = play(world, task, lambda w, info: say(random.choice(info["admissible"])))
        assert not any(step.info["failure"] for step in steps)
        assert steps[-1].terminated != steps[-1].truncated and len(steps) <= 16
        assert steps[-1].info["success"] == steps[-1].terminated
        won += steps[-1].info["success"]
    assert 0.1 < won / 150 < 0.6


@pytest.mark.parametrize("format_", ["action", "react", "tools"])
def test_a_player_of_noise_is_answered(format_):
    random, world = Random(4), House(format=format_)
    pieces = ["go", "open", "den", "box", "safe", "Action:", "<tool_call>", '{"name": "go"}', "</tool_call>", "\n", "."]
    odd = [None, 5, [], {}, [{"type": "image"}]]
    for task in House.tasks("train", count=10):
        before = world.reset(seed=0, task=task).info["admissible"]
        for _ in range(100):
            text = " ".join(random.choices(pieces, k=random.randrange(5)))
            message = {"content": random.choice([text, text, random.choice(odd)]), "tool_calls": random.choice(odd)}
            step = world.step(message)
            if step.info["failure"]:
                assert step.info["failure"] in FAILURES and step.info["action"] == ""
                assert step.messages[0]["content"] == NOTHING and step.info["admissible"] == before
            before = step.info["admissible"]
            if step.done:
                break


def test_what_is_not_possible_changes_nothing():
    world, task = House(), House.tasks("train", count=1)[0]
    start = world.reset(seed=0, task=task)
    for text, failure in [
        ("go nowhere", "invalid_action"),
        ("take key", "invalid_action"),
        ("open", "invalid_action"),
        ("sing loudly", "unparseable"),
        ("", "empty"),
        (None, "empty"),
    ]:
        step = world.step(say(text))
        assert (step.info["failure"], step.messages[0]["content"]) == (failure, NOTHING)
        assert step.info["admissible"] == start.info["admissible"]
    assert world.step(say(start.info["admissible"][0].upper() + ".")).info["failure"] == ""


def test_tools_are_answered_as_tool_messages():
    world, task = House(format="tools"), House.tasks("train", count=1)[0]
    start = world.reset(seed=0, task=task)
    assert {t["function"]["name"] for t in start.tools} == {"go", "open", "take", "put", "unlock"}
    step = world.step(world.expert())
    assert step.messages[0]["role"] == "tool" and step.info["action"] in start.info["admissible"]
    for name, arguments in [("fly", {"room": "den"}), ("go", {"to": "den"}), ("go", {}), ("go", {"room": 5})]:
        step = world.step({"tool_calls": [{"function": {"name": name, "arguments": arguments}}]})
        assert step.messages[0] == {"role": "tool", "name": name, "content": NOTHING}
        assert step.info["failure"] == "tool_error"
    step = world.step({"tool_calls": [{"function": {"name": "go", "arguments": {"room": "nowhere"}}}]})
    assert step.info["failure"] == "invalid_action"
    step = world.step(say("I would rather talk."))
    assert step.messages[0]["role"] == "user" and step.info["failure"] == "unparseable"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "prose"}, "format='prose'"),
        ({"rooms": [1, 9]}, r"rooms=\[1, 9\]"),
        ({"types": ["dig"]}, "types="),
        ({"count": 0}, "count=0"),
        ({"count": 10_000, "rooms": [2, 2], "turns": [12, 12]}, "found 0 of count=10000 tasks"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        House.tasks("train", **options)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        House.tasks("test")


def test_it_plays_in_a_pool_as_it_plays_here():
    tasks = load_environment(HOUSE).tasks("valid_seen", count=4)
    options = {"instructions": False}
    worlds = [House(**options) for _ in tasks]
    with EnvironmentPool(HOUSE, options, size=4) as pool:
        starts = pool.reset({slot: (slot, task) for slot, task in enumerate(tasks)})
        assert starts == {slot: worlds[slot].reset(seed=slot, task=task) for slot, task in enumerate(tasks)}
        playing = set(range(4))
        while playing:
            messages = {slot: worlds[slot].expert() for slot in playing}
            answers = pool.step(messages)
            assert answers == {slot: worlds[slot].step(messages[slot]) for slot in playing}
            playing = {slot for slot in playing if not answers[slot].done}


def test_the_pools_own_options_do_not_reach_the_tasks():
    from opdengine.config.train import EnvironmentConfig
    from opdengine.environments.setup import load_tasks

    prompts = load_tasks(EnvironmentConfig(name=HOUSE, options={"count": 3, "network": True}), "train")
    assert [p.extra["task"] for p in prompts.prompts] == House.tasks("train", count=3)
