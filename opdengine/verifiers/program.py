"""The ``code`` verifier: does the program pass its tests? Programs run in :mod:`opdengine.verifiers.sandbox`.

A program is never told what is expected of it. It gets one input at a time and what it answers is compared
outside of its sandbox, so it can forge its answer but not the verdict.
"""

from __future__ import annotations

import ast
import builtins
import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdengine.models.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.fences import fenced_blocks
from opdengine.verifiers.sandbox.session import SandboxError, Session, find_tier
from opdengine.verifiers.sandbox.tiers import Limits, Tier
from opdengine.verifiers.score import NO_ANSWER, Score, VerifierSettings, as_score
from opdengine.workers.plain import decode, encode

logger = logging.getLogger(__name__)

CASE_SECONDS = 10.0
MARGIN_SECONDS = 2.0
PYTHON = re.compile(r"(?:i?python|py|pypy)[\d.]*")
STATEMENT = re.compile(r"\b(?:print|input|def|class|import|for|while|stdout)\b|=")
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class CodeTests:
    """The tests of a program: the ``answer`` of a prompt, as a mapping or as JSON text of one.

    Args:
        inputs: standard inputs, or lists of arguments where there is an ``entry``.
        outputs: expected standard outputs or returned values.
        entry: function (or method of a class ``Solution``) to call.
        test: code that calls the functions and raises where they are wrong (HumanEval, MBPP).
        prefix: put before the program; with ``test`` also executed before the test.
        time_limit: seconds per case.
        alternatives: an expected value ``[x]`` also accepts ``x`` (as in APPS and what derives from it).
    """

    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    entry: str = ""
    test: str = ""
    prefix: str = ""
    time_limit: float = CASE_SECONDS
    alternatives: bool = False

    @classmethod
    def read(cls, answer: Any) -> CodeTests:
        """
        Raises:
            ValueError: the answer is not of this form.
        """
        try:
            tests = cls(**(json.loads(answer) if isinstance(answer, str) else answer))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the answer of a code prompt is a mapping of 'inputs', 'outputs', ...: {error}"
            ) from error
        if tests.test:
            ast.parse(tests.test)
        elif not tests.inputs or len(tests.inputs) != len(tests.outputs):
            raise ValueError(
                f"{len(tests.inputs)} inputs and {len(tests.outputs)} outputs; each case needs one of both"
            )
        return tests


class CodeVerifier:
    """1 when the program in a completion passes all its tests, else 0.

    Args:
        settings: the whole grading of one program takes no longer than its time limit.

    Raises:
        ValueError: this system offers no isolation (see :func:`opdengine.verifiers.sandbox.session.find_tier`).
    """

    def __init__(self, settings: VerifierSettings) -> None:
        self._tier, self._seconds = sandbox_of("code", settings)
        self._limits = Limits(cpu=math.ceil(self._seconds))

    def __call__(self, text: str, answer: Any, messages: Sequence[Message]) -> Score:
        """Grade one completion."""
        tests = CodeTests.read(answer)
        if answer_part(text) is None:
            return as_score(NO_ANSWER)
        code = extract_program(text, tests)
        if not code:
            return Score(0.0, detail="no program in the completion")
        clock = Clock(tests.time_limit, self._seconds)
        try:
            with Session(self._tier, self._limits) as session:
                if tests.test:
                    with Session(self._tier, self._limits) as judge:
                        wrong = _run_test(session, judge, code, tests, clock)
                elif tests.entry:
                    wrong = _call_function(session, code, tests, clock)
                else:
                    wrong = _run_program(session, code, tests, clock)
        except SandboxError as error:
            return Score(0.0, "sandbox", str(error))
        return Score(float(not wrong), detail=wrong)


def extract_program(text: str, tests: CodeTests) -> str:
    """The program in a completion, with the prefix of its tests; empty where there is none.

    Looked for behind the thoughts: the last fenced block that defines the entry point, else the last one that is
    marked as Python, else the last one without a mark that looks like a program. Blocks of other languages are none.
    Without any fence it is all of the text.
    """
    text = answer_part(text) or ""
    blocks = fenced_blocks(text)
    if not blocks:
        return tests.prefix + text if text.strip() else ""
    marked = [block.code for block in blocks if PYTHON.fullmatch(block.language)]
    plain = [block.code for block in blocks if not block.language]
    definition = re.compile(rf"\bdef[ \t]+{re.escape(tests.entry)}\b")
    for choice in (
        [code for code in (*plain, *marked) if tests.entry and definition.search(code)],
        marked,
        [code for code in plain if STATEMENT.search(code)],
        plain,
    ):
        if choice:
            return f"{tests.prefix}\n{choice[-1]}" if choice[-1].strip() else ""
    return ""


def sandbox_of(verifier: str, settings: VerifierSettings) -> tuple[Tier, float]:
    """Where a verifier runs programs, and for how many seconds one at most; a warning where nothing isolates them.

    Raises:
        ValueError: this system offers no isolation, and the settings do not allow to go without.
    """
    try:
        tier = find_tier(settings.allow_unsandboxed)
    except SandboxError as error:
        raise ValueError(f'the verifier "{verifier}": {error}') from error
    if not tier.isolated:
        logger.warning("programs of the model run WITHOUT isolation (verifier_allow_unsandboxed)")
    return tier, max(settings.timeout - MARGIN_SECONDS, settings.timeout / 2)


class Clock:
    """The seconds that are left for one program.

    Args:
        case: most seconds for one case.
        total: most seconds for all cases together, from now on.
    """

    def __init__(self, case: float, total: float) -> None:
        self._case, self._end = case, time.monotonic() + total

    def seconds(self) -> float:
        """For the next case."""
        return max(min(self._case, self._end - time.monotonic()), 0.01)


def _run_program(session: Session, code: str, tests: CodeTests, clock: Clock) -> str:
    """Return what is wrong with a program on standard input and output; empty if it is right."""
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), start=1):
        answer = session.run(code, str(given), clock.seconds())
        if "failed" in answer:
            return f"case {number}: {answer['failed']}: {answer['detail']}"
        if answer.get("status") != 0:
            return f"case {number}: exit code {answer.get('status')}: {answer.get('errors')}"
        if not same_text(str(answer.get("output")), str(expected)):
            return f"case {number}: wrong output"
    return ""


def _call_function(session: Session, code: str, tests: CodeTests, clock: Clock) -> str:
    """Return what is wrong with the values that a function returns; empty if they are right."""
    answer = session.start("functions", code, clock.seconds())
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), start=1):
        if wrong := trouble(answer):
            return f"before case {number}: {wrong}"
        answer = session.tell({"call": [tests.entry, [encode(a) for a in given], []]}, clock.seconds())
        if wrong := trouble(answer):
            return f"case {number}: {wrong}"
        try:
            value = decode(answer["value"])
        except (KeyError, ValueError) as error:
            return f"case {number}: no plain data: {error}"
        accepted = [expected, expected[0]] if tests.alternatives and _is_single(expected) else [expected]
        if not any(same_value(value, each) for each in accepted):
            return f"case {number}: wrong value"
    return ""


def _run_test(session: Session, judge: Session, code: str, tests: CodeTests, clock: Clock) -> str:
    """Return what a test says about functions that live in another sandbox than itself; empty if it passes.

    The test runs in ``judge``, the program in ``session``; calls and plain values are handed from one to the other
    here, so that the program sees neither the test nor what is expected.
    """
    answer = session.start("functions", code, clock.seconds())
    if wrong := trouble(answer):
        return wrong
    names = free_names(tests)
    step = judge.start("test", tests.test, clock.seconds(), setup=tests.prefix, names=names)
    while "call" in step:
        reply = session.tell(step, clock.seconds())
        if "failed" in reply:
            return trouble(reply)
        step = judge.tell({k: reply[k] for k in ("value", "raised") if k in reply}, clock.seconds())
    return "" if step.get("passed") is True else trouble(step) or "the test did not end"


def free_names(tests: CodeTests) -> list[str]:
    """Names that a test takes from the program: the entry point and what the test uses without defining it.

    Never a builtin: a program that defines ``abs`` or ``len`` must not change what the test means by it.
    """
    nodes = list(ast.walk(ast.parse(f"{tests.prefix}\n{tests.test}")))
    used = {n.id for n in nodes if isinstance(n, ast.Name)}
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    stored |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    stored |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    stored |= {
        (a.asname or a.name).split(".")[0]
        for n in nodes
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    stored |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    return sorted(({tests.entry} - {""}) | (used - stored - set(dir(builtins))))


def trouble(answer: Mapping[str, Any]) -> str:
    """Why an answer of the sandbox is none."""
    if "failed" in answer:
        return f"{answer['failed']}: {answer.get('detail')}"
    if "raised" in answer:
        return f"raised {answer['raised']}"
    return ""


def _is_single(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 1


def same_text(found: str, expected: str) -> bool:
    """Whether outputs agree word by word; numbers with a decimal point to a relative or absolute 1e-6."""
    lines = [[line.split() for line in text.strip().splitlines()] for text in (found, expected)]
    if [len(line) for line in lines[0]] != [len(line) for line in lines[1]]:
        return False
    pairs = (pair for a, b in zip(*lines, strict=True) for pair in zip(a, b, strict=True))
    return all(a == b or _close(a, b) for a, b in pairs)


def _close(found: str, expected: str) -> bool:
    if "." not in expected or not (NUMBER.fullmatch(found) and NUMBER.fullmatch(expected)):
        return False
    return _is_close(float(found), float(expected))


def _is_close(found: float, expected: float) -> bool:
    """Whether they agree to a relative or absolute 1e-6; an integer beyond the range of floats is close to none."""
    try:
        return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
    except OverflowError:
        return False


def same_value(found: Any, expected: Any) -> bool:
    """Whether a returned value is the expected one, which was JSON: tuples count as lists, keys as text.

    Floats agree to a relative or absolute 1e-6.
    """
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return False
        return all(map(same_value, found, expected))
    if isinstance(expected, dict):
        if not isinstance(found, dict) or {str(k) for k in found} != {str(k) for k in expected}:
            return False
        by_text = {str(k): v for k, v in found.items()}
        return all(same_value(by_text[str(k)], v) for k, v in expected.items())
    if isinstance(expected, bool) or isinstance(found, bool):
        return found is expected
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return found == expected or _is_close(found, expected)
    return bool(type(found) is type(expected) and found == expected) or (
        isinstance(found, float) and isinstance(expected, int) and found == expected
    )
