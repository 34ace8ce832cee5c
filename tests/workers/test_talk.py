"""Talks with workers, commands and what they leave: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdengine.workers.process import WorkerProcess
from opdengine.workers.talk import Talk, WorkerLost, hold

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(HERE))
    workers: list[WorkerProcess] = []

    def one() -> WorkerProcess:
        workers.append(WorkerProcess(1 << 16, "echo_worker"))
        return workers[-1]

    yield one
    for worker in workers:
        worker.end()


def gone(pid: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_talks_go_on_at_the_same_time_and_each_has_its_own_end(start: Any) -> None:
    heard: dict[str, list[Any]] = {"many": [], "lost": [], "late": []}
    many, lost, late = start(), start(), start()

    def ask(name: str, worker: WorkerProcess, *questions: tuple[dict[str, Any], float]) -> Talk[None]:
        for question, seconds in questions:
            try:
                heard[name].append((yield worker, question, seconds)["said"])
            except WorkerLost as error:
                heard[name].append(error.reason)
                return

    hold(
        [
            ask("late", late, ({"say": 1, "seconds": 60}, 1.0)),
            ask("many", many, *[({"say": i}, 30.0) for i in range(5)]),
            ask("lost", lost, ({"say": 1}, 30.0), ({"exit": 3}, 30.0), ({"say": 2}, 30.0)),
        ]
    )
    assert heard == {"many": [0, 1, 2, 3, 4], "lost": [1, "crash"], "late": ["timeout"]}
    assert "heard 4" in many.tail() and "heard 3" not in many.tail()
    assert lost.end() == 3


def test_an_answer_that_is_not_wanted_any_more_is_cut_short(start: Any) -> None:
    worker, said = start(), []

    def ask(question: Any) -> Talk[None]:
        said.append((yield worker, question, 20.0)["said"])

    def change_of_mind() -> Talk[None]:
        yield worker, {"say": 1, "seconds": 600}, 0.5

    with pytest.raises(WorkerLost, match=r"no answer within 0\.5 s"):
        hold([change_of_mind()])
    worker.interrupt()
    hold([ask(None)])
    worker.interrupt()  # too late: it has answered
    hold([ask({"say": 2})])
    assert said == ["interrupted", 2]


def test_a_command_is_told_to_end_and_its_children_are_ended(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import signal, subprocess, sys, time
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        def leave(*_):
            open(sys.argv[1], "a").write(" told")
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        open(sys.argv[1], "w").write(str(child.pid))
        time.sleep(600)
    """)
    note, log = tmp_path / "note", tmp_path / "log"
    command = [sys.executable, "-c", script, str(note)]
    worker = WorkerProcess(command=command, environment=dict(os.environ), log=str(log))
    while not (note.exists() and note.read_text()):
        assert worker.poll() is None
        time.sleep(0.05)
    worker.end()
    worker.end()
    pid, told = note.read_text().split()
    assert told == "told" and gone(int(pid)) and log.exists() and not Path(worker.folder).exists()


@pytest.mark.parametrize("work", ["time.sleep(600)", "hold([ask()])"])
def test_folders_of_a_killed_owner_are_removed_and_those_of_one_that_lives_are_not(tmp_path: Path, work: str) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(HERE)!r})
        from opdengine.workers.process import WorkerProcess
        from opdengine.workers.talk import hold
        def ask():
            yield second, {{"say": 1, "seconds": 600}}, 600.0
        first = WorkerProcess(1 << 16, "echo_worker", left=[{str(kept)!r}])
        first.end()
        second = WorkerProcess(1 << 16, "echo_worker", left=[{str(kept)!r}])
        print(second.pid, second.folder, flush=True)
        {work}
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        guard, folder = owner.stdout.readline().split()
        assert kept.exists()
        owner.send_signal(signal.SIGKILL)
    assert gone(int(guard)) and not kept.exists() and not Path(folder).exists()
