"""ALFWorld's engine: generated games, official ones, and the chat around them."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from envs_helpers import play_expert, play_odd_messages, play_random, say, transcripts_of_two_processes

from opdengine.environments import InfrastructureError
from opdengine.environments.alfworld import ALFWorld
from opdengine.environments.alfworld_games import TYPES, UNSEEN_ROOMS, make_game
from opdengine.environments.pool import EnvironmentPool

pytestmark = pytest.mark.envs


@pytest.fixture(scope="module")
def world():
    world = ALFWorld()
    yield world
    world.close()


@pytest.mark.parametrize("split", ["train", "valid_seen", "valid_unseen"])
def test_expert_succeeds_in_every_type_of_task(world, split):
    tasks = ALFWorld.tasks(split, count=6)
    assert [task["type"] for task in tasks] == list(TYPES)
    for task in tasks:
        start, steps = play_expert(world, task)
        assert not any(step.done or step.reward for step in steps[:-1])
        last = steps[-1]
        assert last.terminated and not last.truncated and last.reward == 1
        assert last.info["success"] is True and last.info["score"] == 1
        assert task["object"].lower() in start.info["goal"] and task["target"].lower() in start.info["goal"]
        assert start.info["goal"] in start.messages[-1]["content"]
        assert len(steps) >= 3


@pytest.mark.parametrize("seed", range(6))
def test_expert_recovers_from_any_state(world, seed):
    (task,) = ALFWorld.tasks("train", count=1, types=[TYPES[seed]], task_seed=seed)
    draw = random.Random(seed)
    seen = world.reset(seed=0, task=task)
    for _ in range(30):
        seen = world.step(say(draw.choice(seen.info["admissible"])))
        if seen.done:
            return
    for _ in range(30):
        seen = world.step(world.expert())
        if seen.done:
            break
    assert seen.done and seen.info["success"]


def test_random_player_never_breaks_it(world):
    played, failed = play_random(world, ALFWorld.tasks("train", count=60), turns=240)
    assert played >= 240 and failed == 0


def test_odd_messages_change_nothing(world):
    (task,) = ALFWorld.tasks("train", count=1)
    before = world.reset(seed=0, task=task)
    play_odd_messages(world)
    again = world.step(say("look"))
    assert again.info["admissible"] == before.info["admissible"]


def test_a_command_that_does_not_work_is_an_execution_failure(world):
    (task,) = ALFWorld.tasks("train", count=1)
    start = world.reset(seed=0, task=task)
    step = world.step(say("dance with the fridge"))
    assert (step.info["failure"], step.info["action"]) == ("execution", "")
    assert step.info["observation"] == "Nothing happens."
    command = start.info["admissible"][-1]
    assert world.step(say(f"  {command.replace(' ', '   ')} ")).info["action"] == command


def test_nothing_is_solved_at_the_start(world):
    for task in ALFWorld.tasks("valid_unseen", count=12, task_seed=3):
        start = world.reset(seed=0, task=task)
        assert not world.step(say("look")).done
        assert "You are in the middle of a room" in start.info["observation"]


def test_same_task_and_commands_give_the_same_words_in_every_process():
    first, second = transcripts_of_two_processes("alfworld", "train", {}, 15)
    assert first == second and len(first) > 60


def test_splits_have_no_goal_and_no_unseen_room_in_common():
    splits = {name: ALFWorld.tasks(name) for name in ("train", "valid_seen", "valid_unseen")}
    assert {name: len(tasks) for name, tasks in splits.items()} == {
        "train": 3553,
        "valid_seen": 140,
        "valid_unseen": 134,
    }
    goals = {name: {(t["room"], t["type"], t["object"], t["target"]) for t in tasks} for name, tasks in splits.items()}
    assert not goals["train"] & goals["valid_seen"]
    rooms = {name: {goal[0] for goal in some} for name, some in goals.items()}
    assert rooms["valid_seen"] <= rooms["train"] and len(rooms["train"]) > 100
    assert rooms["valid_unseen"] <= UNSEEN_ROOMS and not rooms["valid_unseen"] & rooms["train"]
    types = Counter(task["type"] for task in splits["train"])
    assert set(types) == set(TYPES) and max(types.values()) - min(types.values()) <= 1
    json.dumps(splits)


def test_another_seed_draws_other_tasks():
    first, second = (ALFWorld.tasks("train", count=20, task_seed=seed) for seed in (0, 1))
    assert ALFWorld.tasks("train", count=20) == first
    assert not {t["layout_seed"] for t in first} & {t["layout_seed"] for t in second}


@pytest.mark.parametrize(
    ("options", "word"),
    [({"types": ["a"]}, "types"), ({"types": []}, "types"), ({"format": "xml"}, "format"), ({"count": -1}, "count")],
)
def test_wrong_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        ALFWorld.tasks("train", **options)
    with pytest.raises(ValueError, match=word):
        ALFWorld(**options)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'test'.*valid_seen"):
        ALFWorld.tasks("test")


def write_official(folder: Path, task, name: str, *, solvable: bool = True, grammar=lambda text: text) -> Path:
    """A game in the layout of ``alfworld-download``."""
    place = folder / name
    place.mkdir(parents=True)
    game = make_game(task)
    game |= {"solvable": solvable, "grammar": grammar(game["grammar"])}
    (place / "game.tw-pddl").write_text(json.dumps(game))
    lamp = task["type"] == TYPES[1]
    goal = {
        "object_target": task["object"],
        "parent_target": "" if lamp else task["target"],
        "toggle_target": task["target"] if lamp else "",
        "mrecep_target": "",
        "object_sliced": False,
    }
    (place / "traj_data.json").write_text(json.dumps({"task_type": task["type"], "pddl_params": goal}))
    return place


def test_official_games_are_played(world, tmp_path, monkeypatch):
    root = tmp_path / "json_2.1.1"
    drawn = ALFWorld.tasks("valid_seen", count=2)
    good = [write_official(root, t, f"valid_seen/{t['type']}-{i}/trial_T{i}") for i, t in enumerate(drawn)]
    write_official(root, drawn[0], "valid_seen/unsolvable/trial", solvable=False)
    write_official(root, drawn[0], "valid_seen/pick_and_place_with_movable_recep-Spoon/trial")
    write_official(root, drawn[0], "valid_seen/pick_cool-AppleSliced/trial")
    bare = write_official(root, drawn[0], "valid_seen/no_game/trial")
    (bare / "game.tw-pddl").unlink()
    tasks = ALFWorld.tasks("valid_seen", data_dir=str(tmp_path))
    assert tasks == ALFWorld.tasks("valid_seen", data_dir=str(root))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tasks == ALFWorld.tasks("valid_seen", data_dir="~")
    assert [task["game"] for task in tasks] == sorted(str(place / "game.tw-pddl") for place in good)
    assert len(ALFWorld.tasks("valid_seen", data_dir=str(root), types=[TYPES[1]])) == 1
    for task in tasks:
        _, steps = play_expert(world, task)
        assert steps[-1].info["success"]


def test_games_of_the_older_language_are_played(world, tmp_path):
    (drawn,) = ALFWorld.tasks("train", count=1)
    old = {"grammar": lambda text: text.replace("move {o} to {r}", "put {o} in/on {r}")}
    write_official(tmp_path, drawn, "train/old/trial", **old)
    start, steps = play_expert(world, ALFWorld.tasks("train", data_dir=str(tmp_path))[0])
    assert steps[-1].info["action"].startswith("put ") and steps[-1].info["success"]
    assert "put THING in/on PLACE" in start.messages[0]["content"]


def test_a_folder_without_games_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no games of 'train'.*alfworld-download"):
        ALFWorld.tasks("train", data_dir=str(tmp_path))
    place = write_official(tmp_path, ALFWorld.tasks("train", count=1)[0], "train/a/trial")
    (place / "traj_data.json").write_text('{"task_type": 3}')
    with pytest.raises(ValueError, match=r"train/a/trial: not a game of ALFWorld"):
        ALFWorld.tasks("train", data_dir=str(tmp_path))


def test_a_game_that_cannot_be_read_is_no_failure_of_the_student(world, tmp_path):
    place = write_official(tmp_path, ALFWorld.tasks("train", count=1)[0], "train/a/trial")
    (task,) = ALFWorld.tasks("train", data_dir=str(tmp_path))
    (place / "game.tw-pddl").write_text("{}")
    with pytest.raises(InfrastructureError, match="train/a/trial"):
        world.reset(seed=0, task=task)
    with pytest.raises(RuntimeError, match="reset"):
        world.step(say("look"))
    assert play_expert(world, ALFWorld.tasks("train", count=1)[0])[1][-1].info["success"]


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    world = ALFWorld()
    play_random(world, ALFWorld.tasks("train", count=3), turns=60)
    world.close()
    world.close()
    assert list(tmp_path.iterdir()) == []


def test_two_worlds_in_one_process_end_in_peace():
    code = (
        "from opdengine.environments.alfworld import ALFWorld as A; t = A.tasks('train', count=2); a, b = A(), A(); "
        "a.reset(seed=0, task=t[1]); b.reset(seed=0, task=t[1]); b.close(); "
        "print(a.step({'content': 'Action: look'}).info['failure'] == ''); a.close()"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_it_plays_in_a_worker_process():
    tasks = ALFWorld.tasks("valid_unseen", count=2)
    with EnvironmentPool("alfworld", {"max_turns": 3}, size=2) as pool:
        starts = pool.reset({slot: (0, task) for slot, task in enumerate(tasks)})
        for turn in range(3):
            steps = pool.step({slot: say("look") for slot in starts})
            assert {step.truncated for step in steps.values()} == {turn == 2}
    assert steps[0].info["success"] is False


def test_the_demonstration_speaks_as_the_games_do(world):
    """Every command of it works in games, and what they answer has the same words, but for names and lists."""

    def words(text):
        return re.sub(r"\b[a-z]+ \d+", "THING", text)

    tasks = ALFWorld.tasks("train", types=["pick_clean_then_place_in_recep"], count=12)
    commands, answers = set(), set()
    for task in tasks:
        start, steps = play_expert(world, task)
        before = [start.info, *(step.info for step in steps[:-1])]
        commands |= {words(command) for info in before for command in info["admissible"]}
        answers |= {words(step.info["observation"]) for step in steps}
    example = start.messages[0]["content"].partition("Here is an example")[2].splitlines()
    shown = [line.removeprefix("Action: ") for line in example if line.startswith("Action: ")]
    assert len(shown) == 7 and {words(command) for command in shown} <= commands
    told = {words(line.removeprefix("Observation: ")) for line in example if line.startswith("Observation: ")}
    assert {t for t in told if "you see" not in t} <= answers and "You move the THING to the THING." in told


def test_without_a_demonstration_there_is_none():
    world = ALFWorld(demonstration=False)
    (task,) = ALFWorld.tasks("train", count=1)
    assert "example" not in world.reset(seed=0, task=task).messages[0]["content"]
    world.close()
