"""Real worker processes: stepped together, broken in every way, replaced, and never left behind."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from troubled import LINES

from opdengine.environments import Broken, InfrastructureError, Observation, Step
from opdengine.environments.pool import MAX_FAILED_STARTS, EnvironmentPool

TROUBLED = f"{Path(__file__).with_name('troubled.py')}:Troubled"


def say(text):
    return {"role": "assistant", "content": text}


def jobs(slots, **task):
    return {slot: (slot, {"id": str(slot), "type": "any", **task}) for slot in slots}


def processes(name):
    """Process ids of everything with this word in its command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if name.encode() in command:
                found.append(int(folder.name))
    return found


def gone(pids, folders=(), seconds=30.0):
    """Wait until these processes and folders are no more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_runs(pid) for pid in pids) and not any(Path(f).exists() for f in folders):
            return True
        time.sleep(0.05)
    return False


def _runs(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def pool():
    with EnvironmentPool(TROUBLED, size=4, step_timeout=30) as pool:
        yield pool


def test_slots_answer_together_and_workers_serve_many_episodes(pool):
    first = pool.reset(jobs(range(4)))
    answers = pool.step({slot: say(f"message {slot}") for slot in range(4)})
    assert [answers[slot].messages[0]["content"] for slot in range(4)] == [f"message {s}" for s in range(4)]
    again = pool.reset(jobs([1, 3]))
    assert all(isinstance(o, Observation) and isinstance(o.messages, tuple) for o in first.values())
    assert again[3].info["pid"] == first[3].info["pid"] and again[3].info["episodes"] == 2
    assert len({o.info["pid"] for o in first.values()}) == 4
    assert pool.counts() == {**dict.fromkeys(pool.counts(), 0.0), "isolated": float(pool.isolated)}


def test_every_fault_breaks_its_own_slot_only():
    faults = {
        "killed": "crash",
        "exit": "crash",
        "segfault": "crash",
        "raise": "error",
        "huge": "observation_too_long",
        "huge info": "observation_too_long",
        "no step": "error",
        "no data": "error",
        "bad word": "error",
    }
    with EnvironmentPool(TROUBLED, size=len(faults) + 1, step_timeout=300) as pool:
        before = pool.reset(jobs(range(pool.size)))
        answers = pool.step({**{i: say(fault) for i, fault in enumerate(faults)}, len(faults): say("fine")})
        assert [answers[i].reason for i in range(len(faults))] == list(faults.values())
        assert answers[len(faults)] == Step(({"role": "user", "content": "fine"},))
        details = {fault: answers[i].detail for i, fault in enumerate(faults)}
        assert "exit code 137" in details["killed"] and "last words" in details["killed"]
        assert "exit code 3" in details["exit"] and "exit code 139" in details["segfault"]
        assert "an unlucky step" in details["raise"] and "not Step" in details["no step"]
        lost = list(range(len(faults)))
        assert gone([before[slot].info["pid"] for slot in lost], [before[slot].info["folder"] for slot in lost])
        after = pool.reset(jobs(range(pool.size)))
        assert all(isinstance(o, Observation) for o in after.values())
        assert after[len(faults)].info["pid"] == before[len(faults)].info["pid"]
        assert after[0].info["episodes"] == 1
        counts = pool.counts()
        assert counts == {
            "restarts": 9.0,
            "start": 0.0,
            "timeout": 0.0,
            "crash": 3.0,
            "error": 4.0,
            "observation_too_long": 2.0,
            "isolated": float(pool.isolated),
        }
        assert pool.counts()["restarts"] == 0.0


def test_a_hanging_step_is_given_up_and_its_worker_replaced():
    with EnvironmentPool(TROUBLED, size=2, step_timeout=5) as pool:
        before = pool.reset(jobs(range(2)))
        answers = pool.step({0: say("hang")})
        assert answers[0].reason == "timeout" and "5 s" in answers[0].detail
        assert gone([before[0].info["pid"]], [before[0].info["folder"]])
        assert pool.step({1: say("fine")})[1].messages[0]["content"] == "fine"
        assert pool.reset(jobs([0]))[0].info["pid"] != before[0].info["pid"]
        assert pool.counts()["timeout"] == 1.0


def test_a_reset_that_raises_is_broken_and_the_slot_recovers(pool):
    answers = pool.reset(jobs([0], reset="raise") | jobs([1]))
    assert answers[0].reason == "error" and "reset failed" in answers[0].detail
    assert isinstance(answers[1], Observation)
    assert isinstance(pool.reset(jobs([0]))[0], Observation)


def test_a_worker_that_cannot_start_again_is_broken(tmp_path):
    marker = tmp_path / "marker"
    with EnvironmentPool(TROUBLED, {"marker": str(marker)}) as pool:
        pool.reset(jobs([0]))
        marker.touch()
        assert pool.step({0: say("killed")})[0].reason == "crash"
        answer = pool.reset(jobs([0]))[0]
        assert answer.reason == "start" and "second start fails" in answer.detail


def test_an_environment_that_never_starts_again_ends_the_run(tmp_path):
    marker = tmp_path / "marker"
    with EnvironmentPool(TROUBLED, {"marker": str(marker)}) as pool:
        pool.reset(jobs([0]))
        marker.touch()
        pool.step({0: say("killed")})
        for _ in range(MAX_FAILED_STARTS - 1):
            assert pool.reset(jobs([0]))[0].reason == "start"
        with pytest.raises(InfrastructureError, match=r"has not started 5 times in a row; .*second start fails"):
            pool.reset(jobs([0]))
        marker.unlink()
        assert isinstance(pool.reset(jobs([0]))[0], Observation)
        assert pool.counts()["start"] == MAX_FAILED_STARTS


def test_a_process_that_the_system_does_not_allow_is_a_failed_start(pool, monkeypatch, tmp_path):
    pool.reset(jobs([0, 1]))
    assert pool.step({0: say("killed")})[0].reason == "crash"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", _no_room)
    answer = pool.reset(jobs([0, 1]))
    assert answer[0].reason == "start" and "Resource temporarily unavailable" in answer[0].detail
    assert isinstance(answer[1], Observation) and os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert isinstance(pool.reset(jobs([0]))[0], Observation)


def _no_room(*_, **__):
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def test_a_malformed_line_breaks_its_own_episode():
    with EnvironmentPool(TROUBLED, size=2, step_timeout=20, max_observation_chars=100_000) as pool:
        for name in LINES:
            pool.reset(jobs([0, 1]))
            answers = pool.step({0: say(name), 1: say("fine")})
            expected = "observation_too_long" if name == "huge line" else "error"
            assert isinstance(answers[0], Broken) and answers[0].reason == expected, (name, answers[0])
            assert answers[1].messages[0]["content"] == "fine"
            assert pool.counts()[expected] == 1


def test_a_late_line_is_not_the_next_answer(pool):
    pool.reset(jobs([0]))
    assert pool.step({0: say("late line")})[0].messages[0]["content"] == "late line"
    answer = pool.step({0: say("wait")})[0]
    assert answer.reason == "error" and "no answer to the question" in answer.detail


@pytest.mark.parametrize(
    "told",
    [
        "reward=float('nan')", "reward=float('inf')", "reward='1'", "reward=None", "reward=[1.0]", "reward=10**400",
        "score=float('nan')", "score=float('inf')", "score=-0.1", "score=1.5", "score='1'", "score=None",
        "score=__import__('numpy').float32('nan')", "raw_score=float('nan')", "success='no'", "success=2",
        "success=float('nan')", "failure='whatever'",
    ],
)  # fmt: skip
def test_rewards_and_scores_that_are_none_break_the_episode_and_name_their_source(told):
    with EnvironmentPool(TROUBLED) as pool:
        pool.reset(jobs([0]))
        answer = pool.step({0: say(f"told {told}")})[0]
        assert isinstance(answer, Broken) and answer.reason == "error"
        assert told.partition("=")[0] in answer.detail and "troubled.py" in answer.detail
        assert pool.counts()["error"] == 1


def test_every_kind_of_number_is_a_reward(pool):
    for value in ("True", "1", "__import__('numpy').float32(1)", "__import__('numpy').bool_(True)", "1.0"):
        pool.reset(jobs([0]))
        assert pool.step({0: say(f"told reward={value}")})[0].reward == 1
        step = pool.step({0: say(f"told score={value}")})[0]
        assert step.done and step.info["score"] == 1


def test_an_environment_that_cannot_start_is_refused_at_once(tmp_path):
    with pytest.raises(InfrastructureError, match="the package is missing; pip install it"):
        EnvironmentPool(TROUBLED, {"broken": True}, 2)
    with pytest.raises(InfrastructureError, match="unexpected keyword argument 'wrong'"):
        EnvironmentPool(TROUBLED, {"wrong": 1})
    with pytest.raises(InfrastructureError, match="unknown environment 'nothing'"):
        EnvironmentPool("nothing")
    with pytest.raises(ValueError, match="size 0"):
        EnvironmentPool(TROUBLED, size=0)


def test_slots_without_an_episode_are_refused(pool):
    with pytest.raises(ValueError, match=r"slots \[0\] .* have no episode"):
        pool.step({0: say("hi")})
    pool.reset(jobs(range(3)))
    assert pool.step({0: say("end"), 1: say("raise")})[0].done
    for slot in (0, 1):
        with pytest.raises(ValueError, match="no episode"):
            pool.step({slot: say("hi")})
    with pytest.raises(ValueError, match=r"size 4 has no slots \[7\]"):
        pool.reset(jobs([7]))


def test_messages_larger_than_a_socket_and_odd_text_arrive_whole():
    text = "é\ud800\n\x00😀" * 200_000
    with EnvironmentPool(TROUBLED, max_observation_chars=10_000_000) as pool:
        pool.reset(jobs([0]))
        assert pool.step({0: say(text)})[0].messages[0]["content"] == text


def test_what_a_worker_started_ends_with_it(pool):
    name = f"left-behind-{os.getpid()}"
    start = pool.reset(jobs([0, 1], spawn=name))
    assert len(processes(name)) == 6
    pool.step({0: say("killed")})
    assert len(processes(name)) == 3, "those of the slot that still plays"
    pool.close()
    assert not processes(name)
    assert not Path(start[0].info["folder"]).exists() and not Path(start[1].info["folder"]).exists()
    pool.close()


OWNER = """
import json, sys, time
from opdengine.environments.pool import MAX_FAILED_STARTS, EnvironmentPool
pool = EnvironmentPool(sys.argv[1], size=2)
starts = pool.reset({slot: (0, {"id": "a", "spawn": sys.argv[2]}) for slot in range(2)})
print(json.dumps([dict(start.info) for start in starts.values()]), flush=True)
pool.step({0: {"content": "hang"}})
"""


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_owner(signal_):
    import json

    name = f"orphan-{os.getpid()}-{signal_.name}"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, TROUBLED, name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    infos = json.loads(owner.stdout.readline())
    left = [info["pid"] for info in infos] + processes(name)
    assert len(left) == 2 + 6 + 1, "workers, what they started, the owner"
    owner.send_signal(signal_)
    owner.wait()
    owner.stdout.close()
    assert gone(left, [info["folder"] for info in infos])


def test_workers_end_when_their_guard_is_killed(pool):
    start = pool.reset(jobs([0]))[0]
    worker = start.info["pid"]
    guard = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    assert gone([worker])
    assert pool.step({0: say("hi")})[0].reason == "crash"
    assert isinstance(pool.reset(jobs([0]))[0], Observation)
    assert not Path(start.info["folder"]).exists()


def test_a_pool_outlives_the_thread_that_made_it():
    made = []
    thread = threading.Thread(target=lambda: made.append(EnvironmentPool(TROUBLED)))
    thread.start()
    thread.join()
    with made[0] as pool:
        assert isinstance(pool.reset(jobs([0]))[0], Observation)
        assert not isinstance(pool.step({0: say("hi")})[0], Broken)


def test_workers_have_no_network_unless_asked():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = say(f"connect {server.getsockname()[1]}")
        with EnvironmentPool(TROUBLED, {"network": True}) as pool:
            pool.reset(jobs([0]))
            assert pool.step({0: connect})[0].messages[0]["content"] == "0"
            assert not pool.isolated and pool.counts()["isolated"] == 0.0
        with EnvironmentPool(TROUBLED) as pool:
            if not pool.isolated:
                pytest.skip("this system allows no network namespaces")
            pool.reset(jobs([0]))
            assert pool.step({0: connect})[0].messages[0]["content"] != "0"
            assert pool.step({0: say("loopback")})[0].messages[0]["content"] == "0"


def test_an_interrupted_call_leaves_no_stale_answer(pool, monkeypatch):
    first = pool.reset(jobs([0, 1]))
    monkeypatch.setattr("selectors.DefaultSelector.select", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.step({0: say("one")})
    monkeypatch.undo()
    assert gone([first[0].info["pid"]])
    pool.reset(jobs([0]))
    assert pool.step({0: say("two"), 1: say("three")})[0].messages[0]["content"] == "two"


def _interrupt(*_):
    raise KeyboardInterrupt
