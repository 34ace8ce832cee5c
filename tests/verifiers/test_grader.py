"""Verifiers that hang, crash, raise or talk nonsense cost their own completion the grade and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forger import LINES

from opdengine.cli import main
from opdengine.config.loading import from_mapping
from opdengine.config.sections import EnvironmentConfig
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.files import DataError
from opdengine.environments.setup import load_tasks
from opdengine.errors import ServiceError
from opdengine.methods import build_method
from opdengine.training.run import train
from opdengine.types import Prompt
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.score import Score, VerifierSettings, as_score

VERIFIER = """
import ctypes, os, pathlib, signal, sys, threading, time

def verify(text, answer, messages):
    if text == "sleep":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if text == "compute":
        sum(range(10**12))  # in C: no other thread of this process runs
    if text == "segfault":
        ctypes.string_at(0)
    if text == "exit":
        os._exit(0)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "leave":
        sys.exit(0)
    if text == "print":
        print("noise " * 10**5)
        os.write(1, b"[1.0]\\n")
    if text == "daemon":
        if os.fork() == 0:
            os.setsid()
            pathlib.Path(answer).write_text(str(os.getpid()))
            time.sleep(1000)
        while not (pathlib.Path(answer).exists() and pathlib.Path(answer).read_text()):
            time.sleep(0.01)
        return 1.0
    if text == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: None)  # raises outside of the main thread
        return threading.current_thread() is threading.main_thread()
    if text.startswith("return "):
        return eval(text[7:])
    return float(text == answer)
"""


def prompt(answer: Any = "yes", key: str = "") -> Prompt:
    return Prompt("p", ({"role": "user", "content": "?"},), key=key, answer=answer)


def grade(grader: Grader, texts: Sequence[str], answer: Any = "yes") -> list[Score]:
    return grader.grade(texts, [prompt(answer)] * len(texts))


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(VERIFIER)
    return f"{tmp_path / 'mine.py'}:verify"


@pytest.fixture
def grader(spec: str) -> Iterator[Grader]:
    with Grader(spec, VerifierSettings(timeout=1.0, workers=2)) as grader:
        yield grader


def test_every_kind_of_trouble_is_named_counted_and_contained(grader: Grader) -> None:
    texts = ["yes", "sleep", "compute", "segfault", "exit", "raise", "leave", "print", "alarm", "no", "yes"]
    scores = grade(grader, texts)
    assert [(s.value, s.failure) for s in scores] == [
        (1, ""),
        (0, "timeout"),
        (0, "timeout"),
        (0, "crash"),
        (0, "crash"),
        (0, "error"),
        (0, "error"),
        (0, ""),
        (1, ""),
        (0, ""),
        (1, ""),
    ]
    assert "Segmentation fault" in scores[3].detail and "no such thing" in scores[5].detail
    failed = {"timeout": 2.0, "crash": 2.0, "error": 2.0, "sandbox": 0.0}
    assert grader.counts() == {f"verifier/failed/{reason}": n for reason, n in failed.items()}
    assert set(grader.counts().values()) == {0.0}, "counts start anew when they were read"


NONSENSE = [
    "2.0",
    "-0.5",
    "1.0000001",
    "float('nan')",
    "float('inf')",
    "-float('inf')",
    "None",
    "'good'",
    "'1'",
    "b'1'",
]
NONSENSE += [
    "[1]",
    "{}",
    "1j",
    "10**400",
    "__import__('numpy').array([0.5, 0.5])",
    "__import__('numpy').float32('nan')",
]
SCORES = [f"__import__('opdengine.verifiers.score').verifiers.score.Score({v})" for v in ("2.0", "'1'", "float('nan')")]
SCORES += ["__import__('opdengine.verifiers.score').verifiers.score.Score(1.0, 'whatever')"]


def test_nonsense_is_no_grade_and_its_source_is_named(grader: Grader) -> None:
    for value, score in zip(NONSENSE + SCORES, grade(grader, [f"return {v}" for v in NONSENSE + SCORES]), strict=True):
        assert score.value == 0 and score.failure == "error", value
        assert "mine.py:verify" in score.detail, (value, score)


def test_every_kind_of_number_is_a_grade(grader: Grader) -> None:
    values = ["True", "1", "__import__('numpy').float32(1)", "__import__('numpy').bool_(True)", "1.0"]
    values += ["__import__('fractions').Fraction(1)", "__import__('decimal').Decimal(1)"]
    scores = grade(grader, [f"return {value}" for value in values])
    assert [(s.value, s.failure) for s in scores] == [(1.0, "")] * len(values)
    assert as_score(np.array([0.5])) == Score(0.5) and as_score(False) == Score(0.0)


RUN = {"model": "m", "teachers": [{"model": "t"}], "train_data": ["data.jsonl"], "output_dir": "run"}
FORGER = f"{Path(__file__).with_name('forger.py')}:verify"


def test_malformed_lines_of_a_worker_cost_their_own_grade() -> None:
    with Grader(FORGER, VerifierSettings(timeout=20, workers=1)) as grader:
        for kind in LINES:
            good, bad, after = grade(grader, ["good", f"{kind}|4", "good"])
            # A new worker is told its settings, then to load, then the first text: the second is question 4.
            assert (good.value, good.failure) == (1, "")
            assert bad.value == 0 and bad.failure in ("error", "crash"), (kind, bad)
            assert (after.value, after.failure) == (1, ""), kind
            counted = grader.counts()
            assert counted["verifier/failed/error"] + counted["verifier/failed/crash"] == 1, kind
            grader.close()


def test_a_late_line_is_not_the_next_grade() -> None:
    with Grader(FORGER, VerifierSettings(timeout=20, workers=1)) as grader:
        first, second, third = grade(grader, ["late|3", "wait", "good"])
        assert (first.value, first.failure) == (0, "")
        assert (second.value, second.failure) == (0, "error") and "no answer to the question" in second.detail
        assert (third.value, third.failure) == (1, "")


def test_workers_that_never_come_to_work_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deadly.py"
    file.write_text(
        "import os, sys\nif 'opdengine.verifiers.worker' in sys.modules: os.kill(os.getpid(), 9)\n"
        "def verify(text, answer, messages): return 1.0\n"
    )
    monkeypatch.delitem(sys.modules, "opdengine.verifiers.worker", raising=False)
    with Grader(f"{file}:verify", VerifierSettings(workers=2)) as grader:
        scores = grade(grader, ["a"] * 3)
        assert {(s.value, s.failure) for s in scores} == {(0, "crash")}
        with pytest.raises(ServiceError, match=r"5 processes of verifiers in a row did not come to grade anything"):
            grade(grader, ["a"] * 100)


@pytest.mark.parametrize("ending", ["sys.exit(0)", "sys.exit()", "exit(0)", "raise SystemExit", "sys.exit('done')"])
def test_a_file_that_leaves_while_it_is_loaded_is_a_failure(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "leaves.py"
    file.write_text(f"import sys\n\n{ending}\n\ndef verify(text, answer, messages): return 1.0\n")
    with pytest.raises(ValueError, match=r"leaves.py:verify' cannot be loaded: .*leaves.py, line 3: it calls exit"):
        Grader(f"{file}:verify")
    with pytest.raises(ConfigError, match=r"method .* cannot be loaded: .*it calls exit"):
        build_method(from_mapping(TrainConfig, {**RUN, "method": f"{file}:verify"}))
    with pytest.raises(DataError, match=r"environment .* cannot be loaded: .*it calls exit"):
        load_tasks(EnvironmentConfig(name=f"{file}:verify"), "train")


def test_code_that_leaves_when_it_is_called_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "leaves.py"
    file.write_text(
        "import sys\nfrom opdengine.methods.method import Method\n"
        "class Mine(Method):\n    def __init__(self, config): sys.exit(0)\n"
        "class Game:\n    reset = step = close = print\n    @classmethod\n    def tasks(cls, split): sys.exit(0)\n"
    )
    config = from_mapping(TrainConfig, {**RUN, "method": f"{file}:Mine"})
    with pytest.raises(ConfigError, match=r"method .* failed: .*leaves.py, line 4: it calls exit"):
        build_method(config)
    with pytest.raises(DataError, match=r"no tasks of split 'train': .*leaves.py, line 8: it calls exit"):
        load_tasks(EnvironmentConfig(name=f"{file}:Game"), "train")

    def leave(text: str, answer: Any, messages: Any) -> float:
        sys.exit(0)

    (score,) = Grader(leave).grade(["a"], [prompt()])
    assert (score.value, score.failure) == (0, "error")


def test_a_command_that_users_code_leaves_is_not_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, status in ((0, 1), (None, 1), ("words", 1), (5, 5)):
        monkeypatch.setattr("opdengine.cli._run", lambda options, rest, code=code: sys.exit(code))
        assert main(["train"]) == status
        assert "it calls exit(); nothing was finished" in capsys.readouterr().err


def test_scores_keep_the_order_over_many_workers(spec: str) -> None:
    with Grader(spec, VerifierSettings(workers=3)) as grader:
        scores = grade(grader, [f"return {i} / 300" for i in range(300)])
    assert [s.value for s in scores] == [i / 300 for i in range(300)]


def test_large_completions_and_answers_arrive_whole(spec: str) -> None:
    text = "ä" * 1_000_000
    with Grader(spec) as grader:
        assert [s.value for s in grade(grader, [text, text[1:]], answer=text)] == [1, 0]


def test_close_ends_what_a_verifier_started(spec: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with Grader(spec) as grader:
        assert grade(grader, ["daemon"], answer=str(note))[0].value == 1
        daemon = int(note.read_text())
        assert alive(daemon)
    assert gone(daemon)
    grader.close()


def test_nothing_outlives_a_killed_parent(spec: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = textwrap.dedent(f"""
        import os, threading, time
        from opdengine.types import Prompt
        from opdengine.verifiers.grader import Grader
        grader = Grader({spec!r})
        prompt = Prompt("p", (), answer={str(note)!r})
        # From a thread that ends: the workers belong to the process, not to it.
        thread = threading.Thread(target=grader.grade, args=(["daemon"], [prompt]))
        thread.start()
        thread.join()
        print(grader.grade(["no"], [prompt])[0].failure or "graded", flush=True)
        grader.grade(["compute"], [prompt])
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "graded\n"
        family = [int(note.read_text()), *_descendants(parent.pid)]
        assert len(family) >= 3, "daemon, guard and worker"
        parent.send_signal(signal.SIGKILL)
    assert all(gone(pid) for pid in family)


def _descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def test_concurrent_calls_do_not_mix(spec: str) -> None:
    results: dict[int, list[float]] = {}
    with Grader(spec) as grader:

        def run(i: int) -> None:
            results[i] = [s.value for s in grade(grader, [f"return {i} / 10"] * 20)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {i: [i / 10] * 20 for i in range(4)}


def test_an_interrupt_ends_the_workers_and_the_grader_still_works(spec: str) -> None:
    with Grader(spec, VerifierSettings(timeout=1000)) as grader:
        before = set(_descendants(os.getpid()))
        timer = threading.Timer(1.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            grade(grader, ["sleep"])
        assert all(gone(pid) for pid in set(_descendants(os.getpid())) - before)
        assert grade(grader, ["yes"])[0].value == 1


def test_every_prompt_has_the_verifier_of_its_data_source(spec: str) -> None:
    mapping = {"a": "exact_match", "b": "numeric", "default": spec}
    with Grader(mapping) as grader:
        texts = ["4.0", "4.0", "return 0.25", "four"]
        prompts = [prompt("4", "a"), prompt("4", "b"), prompt("4", "c"), prompt("four", "a")]
        assert [s.value for s in grader.grade(texts, prompts)] == [0, 1, 0.25, 1]
    with pytest.raises(ConfigError, match=r"verifier has no entry for data_source 'c' and no 'default'"):
        Grader({"a": "exact_match"}).check([prompt(key="a"), prompt(key="c")])


def test_a_verifier_in_this_process_may_raise() -> None:
    def picky(text: str, answer: Any, messages: Any) -> float:
        return 1 / len(text)

    scores = Grader(picky).grade(["", "ab"], [prompt(), prompt()])
    assert [(s.value, s.failure) for s in scores] == [(0, "error"), (0.5, "")]
    (score,) = Grader("numeric").grade(["4"], [prompt("no number")])
    assert score.failure == "error" and "no number" in score.detail


def test_the_first_failure_of_each_kind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def picky(text: str, answer: Any, messages: Any) -> float:
        raise KeyError(text)

    grader = Grader(picky)
    for text in ("first", "second"):
        grader.grade([text, text], [prompt(), prompt()])
    (record,) = caplog.records
    assert "first" in record.getMessage() and "'p'" in record.getMessage()


def test_what_cannot_be_loaded_is_refused_at_once(tmp_path: Path) -> None:
    broken, short = tmp_path / "broken.py", tmp_path / "short.py"
    broken.write_text("def f(:\n")
    short.write_text("def f(text, answer):\n    return 1.0\n")
    for spec, message in (
        ("grade", "unknown verifier 'grade'"),
        ("nowhere.py:f", "no Python file"),
        (f"{broken}:f", "cannot be loaded: .*invalid syntax"),
        (f"{short}:f", "must take three arguments: text, answer, messages"),
    ):
        with pytest.raises(ValueError, match=message):
            Grader({"default": spec})


@pytest.mark.parametrize("source", ["train_data", "eval_data"])
def test_a_data_source_without_verifier_is_refused_before_models_are_loaded(
    source: str, models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opdengine.training.inputs.load_tokenizer", None)  # would be next
    graded = tmp_path / "graded.jsonl"
    graded.write_text('{"prompt": "1 + 1?", "answer": "2", "data_source": "code"}\n')
    config = {
        "model": models["student"],
        "teachers": [{"model": models["big"]}],
        "method": "uni_opd",
        "num_generations": 2,
        "train_data": [str(graded)],
        "eval_data": [str(graded)],
        "output_dir": str(tmp_path / "run"),
        "verifier": {"code": "exact_match"},
    }
    with pytest.raises(ConfigError, match="verifier has no entry for data_source 'agentic'"):
        train(from_mapping(TrainConfig, {**config, source: [prompt_file]}), progress=False)
