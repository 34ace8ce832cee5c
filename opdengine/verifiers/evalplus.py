"""The verifier of HumanEval+ and MBPP+: programs run in the sandbox, the harness compares what they returned.

``evalplus`` runs a program beside the judge that compares its values. Here the sandbox runs it, and what the harness
runs instead is a function of ours that returns these values, which are plain data, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opdengine.data.benchmarks import BENCHMARKS
from opdengine.models.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.program import Clock, CodeTests, extract_program, sandbox_of, trouble
from opdengine.verifiers.sandbox.session import SandboxError, Session
from opdengine.verifiers.sandbox.tiers import Limits
from opdengine.verifiers.score import NO_ANSWER, Score, VerifierSettings, as_score
from opdengine.workers.plain import decode

CASE_SECONDS = 10.0
REPLAY = """
inf, nan = float("inf"), float("nan")
values = iter({values!r})


def {entry}(*given):
    return next(values)
"""


class EvalPlusVerifier:
    """1 when a program's values pass the harness's comparison on the base and on the plus inputs, else 0.

    Args:
        settings: the whole grading of one program takes no longer than its time limit.

    Raises:
        ValueError: evalplus is not installed, or this system offers no isolation.
    """

    def __init__(self, settings: VerifierSettings) -> None:
        BENCHMARKS["humaneval_plus"].require()
        self._tier, self._seconds = sandbox_of("evalplus", settings)
        self._expected: dict[str, list[Any]] = {}

    def __call__(self, text: str, answer: Any, messages: Sequence[Message]) -> Score:
        """Grade one completion."""
        if answer_part(text) is None:
            return as_score(NO_ANSWER)
        entry, inputs = answer["entry"], answer["inputs"]
        code = extract_program(text, CodeTests(entry=entry, prefix=answer["prefix"]))
        if not code:
            return Score(0.0, detail="no program in the completion")
        clock = Clock(CASE_SECONDS, self._seconds)
        try:
            if answer["reference"] not in self._expected:
                self._expected[answer["reference"]] = self._values(answer["reference"], entry, inputs, clock)
            expected = self._expected[answer["reference"]]
        except (SandboxError, ValueError) as error:
            return Score(0.0, "error", f"the reference solution: {error}; raise verifier_timeout where it is time")
        try:
            found = self._values(code, entry, inputs, clock)
        except SandboxError as error:
            return Score(0.0, "sandbox", str(error))
        except ValueError as error:
            return Score(0.0, detail=str(error))
        return self._compare(answer, found, expected)

    def _values(self, code: str, entry: str, inputs: Sequence[Any], clock: Clock) -> list[Any]:
        """What a program returns for every input.

        Raises:
            ValueError: it does not; says why.
        """
        values = []
        with Session(self._tier, Limits(cpu=math.ceil(self._seconds))) as session:
            if wrong := trouble(session.start("functions", code, clock.seconds())):
                raise ValueError(f"before case 1: {wrong}")
            for number, given in enumerate(inputs, start=1):
                step = session.tell({"call": [entry, given, []]}, clock.seconds())
                if wrong := trouble(step):
                    raise ValueError(f"case {number}: {wrong}")
                try:
                    values.append(decode(step["value"]))
                except KeyError:
                    raise ValueError(f"case {number}: no value") from None
        return values

    def _compare(self, answer: Any, found: list[Any], expected: list[Any]) -> Score:
        from evalplus.eval import PASS, untrusted_check

        inputs = [[decode(argument) for argument in given] for given in answer["inputs"]]
        replay = REPLAY.format(values=found, entry=answer["entry"])
        verdict, details = untrusted_check(
            answer["dataset"],
            replay,
            inputs,
            answer["entry"],
            expected,
            answer["atol"],
            [CASE_SECONDS] * len(inputs),
            fast_check=True,
        )
        return Score(float(verdict == PASS), detail=f"{verdict} after {sum(map(bool, details))} of {len(inputs)} cases")
