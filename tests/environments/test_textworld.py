"""TextWorld's generated games and the chat around them."""

from __future__ import annotations

import json

import pytest
from envs_helpers import play_expert, play_odd_messages, play_random, say, transcripts_of_two_processes

from opdengine.environments import InfrastructureError
from opdengine.environments.pool import EnvironmentPool
from opdengine.environments.textworld import ATTEMPTS, TextWorld

pytestmark = pytest.mark.envs

SIZES = [
    {},
    {"nb_rooms": 1, "nb_objects": 1, "quest_length": 1},
    {"nb_rooms": 1, "nb_objects": 4, "quest_length": 10},
    {"nb_rooms": 6, "nb_objects": 12, "quest_length": 8, "last_step_only": True},
]


@pytest.fixture(scope="module")
def world():
    return TextWorld()


@pytest.mark.parametrize("size", SIZES)
def test_expert_succeeds(world, size):
    for task in TextWorld.tasks("train", count=3, **size):
        start, steps = play_expert(world, task)
        assert len(steps) == size.get("quest_length", 3)
        assert not any(step.done or step.reward for step in steps[:-1])
        last = steps[-1]
        assert last.terminated and last.reward == 1 and last.info["success"] is True and last.info["score"] == 1
        assert start.info["goal"] in start.messages[-1]["content"]


def test_expert_finds_back(world):
    for task in TextWorld.tasks("valid", count=4):
        seen = world.reset(seed=0, task=task)
        for turn in range(12):
            seen = world.step(say(seen.info["admissible"][turn % len(seen.info["admissible"])]))
            if seen.done:
                break
        for _ in range(40):
            if seen.done:
                break
            seen = world.step(world.expert())
        assert seen.info["success"]


def test_the_last_step_is_not_the_whole_way(world):
    whole, last = (TextWorld.tasks("train", count=1, quest_length=6, last_step_only=b)[0] for b in (False, True))
    goals = [world.reset(seed=0, task=task).info["goal"] for task in (whole, last)]
    assert len(goals[1]) < len(goals[0]) / 2


def test_what_is_told_is_what_works(world):
    """Every visible thing that can be taken is named, and the ways out are those that can be gone."""
    checked = 0
    for task in TextWorld.tasks("test", count=8, nb_rooms=5, nb_objects=12):
        seen = world.reset(seed=0, task=task)
        for _ in range(6):
            told = world.step(say("look"))
            ways = told.info["observation"].split("Ways out: ")[1].rstrip(".")
            gone = {command.split()[1] for command in told.info["admissible"] if command.startswith("go ")}
            listed = {way.split(" (")[0] for way in ways.split(", ") if not way.endswith((", closed)", ", locked)"))}
            listed = {way for way in listed if way in ("north", "south", "east", "west")}
            shut = {way.split(" ")[0] for way in ways.replace(", ", ";").split(";") if "(" in way}
            assert gone <= listed | shut and listed - shut <= gone
            for command in told.info["admissible"]:
                if command.startswith("take "):
                    thing, _, place = command.removeprefix("take ").partition(" from ")
                    assert thing in told.info["observation"] and place in told.info["observation"]
                    checked += 1
            moves = [c for c in told.info["admissible"] if c.startswith(("go ", "open "))]
            if not moves:
                break
            seen = world.step(say(moves[-1]))
            if seen.done:
                break
    assert checked > 5


def test_every_command_has_its_sentence(world):
    tasks, verbs = TextWorld.tasks("train", count=6, nb_rooms=2, nb_objects=12), set()
    for task in tasks:
        seen = world.reset(seed=0, task=task)
        while fresh := [c for c in seen.info["admissible"] if c.split()[0] not in verbs]:
            verbs.add(fresh[0].split()[0])
            seen = world.step(say(fresh[0]))
            assert len(seen.info["observation"]) > 8 and seen.info["failure"] == ""
            if seen.done:
                break
    assert {"look", "inventory", "examine", "go", "drop", "take", "open", "close", "put"} <= verbs


def test_random_player_never_breaks_it(world):
    played, failed = play_random(world, TextWorld.tasks("train", count=20), turns=400)
    assert played >= 400 and failed == 0


def test_odd_messages_change_nothing(world):
    (task,) = TextWorld.tasks("train", count=1)
    before = world.reset(seed=0, task=task)
    play_odd_messages(world)
    assert world.step(say("look")).info["observation"] == before.info["observation"]
    step = world.step(say("dance with the fridge"))
    assert (step.info["failure"], step.info["action"]) == ("execution", "")


def test_same_task_and_commands_give_the_same_words_in_every_process():
    first, second = transcripts_of_two_processes("textworld", "train", {}, 30)
    assert first == second and len(first) > 60


def test_splits_are_disjoint(world):
    splits = {name: TextWorld.tasks(name, count=25) for name in ("train", "valid", "test")}
    seeds = [task["game_seed"] for tasks in splits.values() for task in tasks]
    assert len(set(seeds)) == 75
    words = [world.reset(seed=0, task=task).messages[-1]["content"] for tasks in splits.values() for task in tasks[:10]]
    assert len(set(words)) == len(words)
    everything = [{t["game_seed"] for t in TextWorld.tasks(name, task_seed=s)} for name in splits for s in (0, 1)]
    train, valid, test = (everything[i] | everything[i + 1] for i in (0, 2, 4))
    assert not train & valid and not train & test and not valid & test
    json.dumps(splits)


@pytest.mark.parametrize("option", ["nb_rooms", "nb_objects", "quest_length", "count"])
def test_wrong_options_are_named(option):
    with pytest.raises(ValueError, match=option):
        TextWorld.tasks("train", **{option: -1})
    with pytest.raises(ValueError, match="valid_unseen"):
        TextWorld.tasks("valid_unseen")


def test_a_map_without_room_for_the_quest_is_replaced_by_the_next(world, monkeypatch):
    (task,) = TextWorld.tasks("train", count=1)
    make, seeds = world._generator.make_game, []

    def fail_twice(options):
        seeds.append(dict(options.seeds))
        if len(seeds) % 3:
            raise world._generator.QuestGenerationError("no room")
        return make(options)

    monkeypatch.setattr(world._generator, "make_game", fail_twice)
    first, second = (world.reset(seed=0, task=task).messages for _ in range(2))
    assert first == second and seeds[:3] == seeds[3:] and seeds[0] != seeds[1]

    def fail(options):
        seeds.append(options.seeds)
        raise world._generator.QuestGenerationError("no room")

    seeds.clear()
    monkeypatch.setattr(world._generator, "make_game", fail)
    with pytest.raises(InfrastructureError, match=r"quest_length=3.*nb_rooms=3.*make the game larger"):
        world.reset(seed=0, task=task)
    assert len(seeds) == ATTEMPTS


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    world = TextWorld()
    play_random(world, TextWorld.tasks("train", count=2), turns=50)
    world.close()
    world.close()
    assert list(tmp_path.iterdir()) == []


def test_it_plays_in_a_worker_process():
    tasks = TextWorld.tasks("test", count=2)
    with EnvironmentPool("textworld", {"max_turns": 2}, size=2) as pool:
        starts = pool.reset({slot: (0, task) for slot, task in enumerate(tasks)})
        for _ in range(2):
            steps = pool.step({slot: say("look") for slot in starts})
    assert all(step.truncated and step.info["success"] is False for step in steps.values())
