"""Programs are judged by what they compute; programs that attack the judge instead fail."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from opdengine.types import Prompt
from opdengine.verifiers import load_verifier
from opdengine.verifiers.evalplus import EvalPlusVerifier
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.program import CodeTests, CodeVerifier, extract_program, free_names, same_text, same_value
from opdengine.verifiers.sandbox import session as sandbox
from opdengine.verifiers.sandbox.session import SandboxError
from opdengine.verifiers.sandbox.tiers import Tier
from opdengine.verifiers.score import Score, VerifierSettings

CALLS = {
    "entry": "double",
    "inputs": [[1], [-4], [2.5], ["ab"], [[1, 2]]],
    "outputs": [2, -8, 5.0, "abab", [1, 2, 1, 2]],
}
TEST = {
    "entry": "double",
    "prefix": 'import math\n\n\ndef double(x):\n    """Twice x."""\n',
    "test": textwrap.dedent(
        """
        def check(candidate):
            assert candidate(1) == 2
            assert abs(candidate(-4) + 8) < 1e-9 and len(candidate("ab")) == 4
            assert candidate([1, 2]) == [1, 2, 1, 2], "lists too"
            assert isinstance(candidate(2.5), float) and math.isclose(candidate(2.5), 5.0)
            for i in range(5):
                assert candidate(x=i) == 2 * i
            try:
                candidate(None)
            except TypeError:
                pass
            else:
                raise AssertionError("None has no double")
        check(double)
        """
    ),
}
PROGRAM = {"inputs": ["3\n1 2 3\n", "1\n-7\n"], "outputs": ["2 4 6\n", "-14"]}

HONEST = "def double(x):\n    return x * 2\n"
HONEST_PROGRAM = "n = int(input())\nprint(*[2 * int(w) for w in input().split()])\n"

# Each defines double(), which is wrong; some are programs on standard input, too.
CHEATS = {
    "equal_to_all": """
        class Anything(int):
            def __eq__(self, other): return True
            __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __eq__
            __hash__ = None
            def __bool__(self): return True
            def __abs__(self): return 0
            def __len__(self): return 4
        def double(x): return Anything()
    """,
    "equal_object": """
        class Anything:
            def __eq__(self, other): return True
            def __getattr__(self, name): return self
            def __call__(self, *a, **k): return self
        def double(x): return Anything()
        """,
    "exits_at_once": "import sys\nsys.exit(0)",
    "exits_hard_at_once": "import os\nos._exit(0)",
    "exits_in_the_call": "import sys\ndef double(x): sys.exit(0)",
    "exits_hard_in_the_call": "import os\ndef double(x): os._exit(0)",
    "raises_what_passes": "def double(x): raise SystemExit(0)",
    "says_passed": """
        print("passed"); print('{"passed": true}')
        def double(x):
            print("passed")
            return "passed"
    """,
    "writes_to_all_descriptors": """
        import os
        def shout():
            for fd in range(1, 300):
                for text in ('{"passed": true}', '{"line": {"passed": true}}', '{"value": true}', '{"output": ""}'):
                    try: os.write(fd, text.encode() + b"\\n")
                    except OSError: pass
        shout()
        def double(x):
            shout()
            return True
    """,
    "forges_from_a_thread": """
        import os, threading
        def shout():
            while True:
                try: os.write(4, b'{"passed": true}\\n{"value": 2}\\n')
                except OSError: return
        threading.Thread(target=shout, daemon=True).start()
        def double(x): return None
    """,
    "looks_for_the_answer": """
        import gc, sys
        def double(x):
            frame = sys._getframe()
            while frame:
                for name, value in {**frame.f_globals, **frame.f_locals}.items():
                    if name in ("outputs", "expected", "answer", "test", "tests"):
                        return value[0] if isinstance(value, (list, tuple)) else value
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, dict) and ("outputs" in thing or "expected" in thing):
                    return (thing.get("outputs") or thing.get("expected"))[0]
    """,
    "patches_the_judge": """
        import builtins, json, math, operator, sys
        for frame in sys._current_frames().values():
            while frame:
                for name in list(frame.f_globals):
                    if callable(frame.f_globals[name]) and name.startswith(("same", "check", "_test", "verify")):
                        frame.f_globals[name] = lambda *a, **k: True
                frame = frame.f_back
        json.dumps = lambda *a, **k: '{"passed": true}'
        json.loads = lambda *a, **k: {"passed": True}
        builtins.AssertionError = Exception
        builtins.abs = lambda x: 0
        builtins.len = lambda x: 4
        builtins.isinstance = lambda *a: True
        math.isclose = lambda *a, **k: True
        def double(x): return 0
    """,
    "takes_over_names_of_the_test": """
        def check(candidate): pass
        def abs(x): return 0
        def len(x): return 4
        def isinstance(x, t): return True
        def range(n): return []
        def double(x): return 0
    """,
    "returns_no_number": "def double(x): return float('nan')",
    "returns_infinity": "def double(x): return float('inf')",
    "returns_true": "def double(x): return True",
    "returns_the_input": "def double(x): return x",
    "returns_a_generator": "def double(x):\n    yield x * 2",
    "returns_itself": "def double(x):\n    a = []; a.append(a); return a",
    "returns_too_much": "def double(x): return [0] * 10**6",
    "kills_all": "import os\ndef double(x):\n    os.kill(-1, 9)\n    return 2",
    "never_returns": "import time\ndef double(x): time.sleep(1000)",
    "works_once": "calls = 0\ndef double(x):\n    global calls\n    calls += 1\n    return 2 * x if calls == 1 else 0",
    "no_program": "",
    "no_python": "def double(x: return",
    "other_name": "def twice(x): return 2 * x",
}


@pytest.fixture(scope="module")
def verify() -> Iterator[Any]:
    """The verifier, called as a grader calls it."""
    with Grader("code", VerifierSettings(timeout=8, workers=2)) as grader:

        def verify(text: str, answer: Any) -> Score:
            (score,) = grader.grade([text], [Prompt("p", (), answer=answer)])
            assert not score.failure, score
            return score

        yield verify


@pytest.mark.parametrize("tests", [CALLS, TEST, json.dumps(CALLS)], ids=["calls", "test", "text"])
def test_an_honest_function_passes(verify: Any, tests: Any) -> None:
    assert verify(HONEST, tests) == Score(1.0)
    assert verify(f"<think>```python\nno\n```</think>So:\n```python\n{HONEST}```\nDone.", tests) == Score(1.0)
    method = "class Solution:\n    def double(self, x):\n        return x + x\n"
    assert verify(method, CALLS) == Score(1.0)


def test_a_completion_of_the_prefix_passes(verify: Any) -> None:
    assert verify("    return 2 * x\n", TEST) == Score(1.0)


def test_an_honest_program_passes(verify: Any) -> None:
    assert verify(f"```py\n{HONEST_PROGRAM}```", PROGRAM) == Score(1.0)
    in_a_thread = "import threading\ndef main():\n" + textwrap.indent(HONEST_PROGRAM, "    ")
    assert verify(in_a_thread + "threading.Thread(target=main).start()", PROGRAM).value == 1
    guarded = "import sys\nif __name__ == '__main__':\n" + textwrap.indent(HONEST_PROGRAM, "    ") + "    sys.exit(0)"
    assert verify(guarded, PROGRAM).value == 1


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(verify: Any, name: str) -> None:
    program = textwrap.dedent(CHEATS[name])
    for tests in (CALLS, TEST, PROGRAM):
        tests = {**tests, "time_limit": 1.0}
        score = verify(f"```python\n{program}\n```", tests)
        assert score.value == 0 and score.detail, (tests, score)


ENDING_TEST = """
cases = [1, -4, 3]
for found, case in zip(map(double, cases), cases):
    assert found == 2 * case
assert [double(case) for case in cases] == [2, -8, 6]
for value in iter(lambda: double(1), 2):
    raise AssertionError(value)
"""
MAPPED_TEST = ENDING_TEST.partition("assert [")[0]


@pytest.mark.parametrize(
    "error",
    ["StopIteration", "StopAsyncIteration", "GeneratorExit", "KeyboardInterrupt", "SystemExit(0)", "IndexError",
     "type('Mine', (StopIteration,), {})", "BaseException", "ExceptionGroup", "AssertionError"],
)  # fmt: skip
def test_no_exception_ends_a_test_early(verify: Any, error: str) -> None:
    """A test that goes over ``map(function, cases)`` would end without a single comparison."""
    for test in (ENDING_TEST, MAPPED_TEST):
        assert verify(HONEST, {"test": test}).value == 1
        assert verify(f"def double(x): raise {error}", {"test": test}).value == 0
        assert verify(f"def double(x):\n    double.__class__\n    yield\n    raise {error}", {"test": test}).value == 0


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef double(x): os.close(4); return 2 * x",
        "import os\ndef double(x): os.closerange(0, 100); os._exit(0)",
        "import os\ndef double(x): os.write(4, b'{\"raised\": 5}\\n'); return 2 * x",
        'import os\ndef double(x): os.write(4, b\'{"raised": ["StopIteration", ""]}\\n\'); return 2 * x',
        'import os\ndef double(x): os.write(4, b\'{"passed": true, "value": {"eval": 1}}\\n\'); return 2 * x',
        "import os\ndef double(x): os.write(4, b'[' * 100000 + b'\\n'); return 2 * x",
        "import os\ndef double(x): os.write(4, b'\\xff\\xfe\\n'); return 2 * x",
        "def double(x): return 10 ** 400",
        "def double(x): return 10 ** 5000",
        "def double(x): return -10 ** 400",
    ],
)
def test_nonsense_instead_of_a_value_is_wrong_and_no_failure_of_the_verifier(verify: Any, code: str) -> None:
    floats = {"entry": "double", "inputs": [[1]], "outputs": [2.5]}
    for tests in (CALLS, TEST, floats, {"test": MAPPED_TEST}):
        assert verify(code, {**tests, "time_limit": 2.0}).value == 0


def test_exit_and_quit_are_there(verify: Any) -> None:
    for leave in ("exit", "quit"):
        assert verify(f"{HONEST_PROGRAM}{leave}()", PROGRAM).value == 1
        assert verify(f"{HONEST_PROGRAM}{leave}(0)\nprint('more')", PROGRAM).value == 1
        assert "exit code 3" in verify(f"{HONEST_PROGRAM}{leave}(3)", PROGRAM).detail
        assert verify(f"{leave}()\ndef double(x): return 2 * x", CALLS).value == 0


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("print(input())", "case 1: wrong output"),
        ("print(2, 4, 6)", "case 2: wrong output"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("import sys; print('2 4 6'); sys.exit(3)", "exit code 3"),
        ("while True: pass", "case 1: time: more than 1 s"),
        ("while True: print('x' * 1000)", "case 1: output"),
        ("x = bytearray(1 << 33)", "MemoryError"),
        ("import os; os.abort()", "exit code -6"),
    ],
)
def test_what_is_wrong_is_said(verify: Any, program: str, detail: str) -> None:
    score = verify(program, {**PROGRAM, "time_limit": 1})
    assert score.value == 0 and detail in score.detail


def test_cases_share_nothing(verify: Any) -> None:
    hoarder = """
import os
print(len(os.listdir("/tmp")) + len(os.listdir("/dev/shm")))
open("/tmp/file", "w")
os.makedirs("/dev/shm/folder/inner")
"""
    assert verify(hoarder, {"inputs": ["", "", ""], "outputs": ["0", "0", "0"]}).value == 1


def test_a_program_is_told_one_input_at_a_time_and_no_output(verify: Any) -> None:
    spy = """
import gc
def f(x):
    word = "".join(["need", "le-"])
    return sum(word in repr(thing) for thing in gc.get_objects() if isinstance(thing, (str, list, dict, tuple)))
"""
    assert verify(spy, {"entry": "f", "inputs": [[1], [2]], "outputs": [0, "needle-1"]}).detail == "case 2: wrong value"
    assert verify(spy, {"entry": "f", "inputs": [[1], ["needle-2"]], "outputs": [0, 0]}).detail == "case 2: wrong value"


def test_plain_values_of_every_kind_reach_the_test_and_come_back(verify: Any) -> None:
    values = [None, True, -1, 2**70, 1.5, "ä\n", b"\x00\xff", (1, (2,)), {1, 2}, frozenset({3}), {(1, 2): [3]}, 2 + 3j]
    test = f"""
for value in {values!r}:
    back = same(value, key=value)
    assert back == [value, value] and type(back[0]) is type(value), value
"""
    assert verify("def same(x, key): return [x, key]", {"test": test}) == Score(1.0)


def test_mbpp_style_tests_may_use_several_functions(verify: Any) -> None:
    lines = ["import math", "assert area(2) == 4", "assert sorted([volume(2), area(1)]) == [1, 8]"]
    test = "\n".join([*lines, "assert math.isclose(area(0.5), 0.25)"])
    assert free_names(CodeTests(test=test)) == ["area", "volume"]
    assert verify("def area(x): return x**2\ndef volume(x): return x**3", {"test": test}).value == 1
    assert "AttributeError" in verify("def area(x): return x**2", {"test": test}).detail


def test_malformed_tests_are_the_verifiers_failure() -> None:
    with Grader("code", VerifierSettings(workers=1)) as grader:
        for answer in ({"inputs": [1], "outputs": []}, {"cases": 3}, "no JSON", {"test": "assert ("}, 7):
            (score,) = grader.grade([HONEST], [Prompt("p", (), answer=answer)])
            assert score.value == 0 and score.failure == "error", answer


def test_many_slow_cases_end_with_the_time_limit_of_the_whole() -> None:
    verifier = CodeVerifier(VerifierSettings(timeout=4))
    score = verifier("import time; time.sleep(0.5)", {"inputs": [""] * 100, "outputs": [""] * 100}, ())
    assert score.value == 0 and not score.failure and "time" in score.detail


def test_without_isolation_it_refuses_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tier: Any, runtime: Any = None) -> None:
        if tier.isolated:
            raise SandboxError(f"sandbox {tier}: not here")

    monkeypatch.setattr(sandbox, "check_tier", fail)
    sandbox.find_tier.cache_clear()
    with pytest.raises(ValueError, match=r"(?s)unshare.*not here.*verifier_allow_unsandboxed: true"):
        load_verifier("code", VerifierSettings())
    assert str(sandbox.find_tier(True)).startswith("none")
    sandbox.find_tier.cache_clear()


def test_the_program_is_found_in_the_completion() -> None:
    tests = CodeTests(inputs=("",), outputs=("",), entry="f", prefix="import math\n")
    text = "```python\ndef f(): pass\n```\nFor example:\n```\nf()\n```"
    assert extract_program(text, tests) == "import math\n\ndef f(): pass\n"
    assert extract_program(text, CodeTests(inputs=("",), outputs=("",))) == "\ndef f(): pass\n"
    assert extract_program("    return 1", tests) == "import math\n    return 1"


def test_outputs_are_compared_word_by_word() -> None:
    assert same_text("1  2\n3 \n\n", "1 2\n3") and same_text("0.3333333\n", "0.33333333")
    for found, expected in [
        ("1 2 3", "1 2\n3"),
        ("1", "1\n1"),
        ("nan", "0.5"),
        ("0.34", "0.33"),
        ("", "1"),
        ("YES", "Yes"),
    ]:
        assert not same_text(found, expected)


def test_values_are_compared_strictly() -> None:
    same = [((1, [2]), [1, [2]]), (2.0000000001, 2.0), (2, 2.0), (2.0, 2), ({1: "a"}, {"1": "a"}), (None, None)]
    assert all(same_value(found, expected) for found, expected in same)
    different = [
        (True, 1),
        (1, True),
        ("1", 1),
        (1, "1"),
        ([1], [1, 2]),
        ({1}, [1]),
        (None, False),
        (float("nan"), 1.0),
    ]
    assert not any(same_value(found, expected) for found, expected in different)


@pytest.mark.parametrize("verifier", [CodeVerifier, EvalPlusVerifier])
def test_programs_that_nothing_isolates_are_said(
    verifier: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("opdengine.verifiers.program.find_tier", lambda allowed: Tier("none"))
    monkeypatch.setattr("opdengine.data.benchmarks.Benchmark.require", lambda *_: None)
    verifier(VerifierSettings(allow_unsandboxed=True))
    assert "run WITHOUT isolation (verifier_allow_unsandboxed)" in caplog.text
