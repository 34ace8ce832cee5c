"""Nothing that reads a model's text takes more than time in proportion to its length.

Each reader gets long texts that make backtracking expressions quadratic or worse. What is asserted is that it ends at
all while the clock of a whole process allows minutes: quadratic ones take hours.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SIZE = 50_000
PIECES = [
    " ", "\\t", "\\n", "\\\\", "{", "}", "`", "~", "```", "```\\n", "``` ", "```python", "- ", "1. ", "> ",
    "<think>", "</think>",
    "<think></think>", "[THINK]", "'<think>", "</think>'", "\\\\boxed{", "\\\\boxed ", "\\\\text{",
    "\\\\frac{1}{", "\\\\,", "1\\\\,", "1 ",
    "1,", "1", "9", "1.", "1^", "1**", "10^{", "1/", "1e", "-", "\u00b2", "\u00bd", "answer", "answer ",
    "answer is ", "answer:", ":",
    "A ", "(A)", "A or ", "A, ", "not A ", "not ", "A is ", "is ", "so ", "first ", "either ", "if ", "?", ".",
    "* ", "_", "$", "#\\n",
    "<answer>", "</answer>", "<action>", "<action>search[", "] ", "]", "<tool_call>", "</tool_call>", "[", "(",
    "action:", "Action: \\n",
    "<<", "<< CONFIDENCE=", "<<CONFIDENCE=1", "STRONG", "\u2009", "'", "x",
]  # fmt: skip
ENDS = ["", "x", "1", "}"]
WORST = """
from opdengine.environments.actions import search_action, tool_action, visible_text
from opdengine.verifiers import choice, numeric
from opdengine.verifiers.program import CodeTests, extract_program, same_text
from opdengine.verifiers.reasoning_tasks import EVALUATED, extract_answer

tests = CodeTests(test="f()")
many = 400_000
extract_program("```" + " " * many, tests)
extract_program("```python" * many, tests)
extract_answer("<answer>" * many)
EVALUATED["countdown"].fullmatch("1" * 60 + "x")
visible_text({"content": "<think>" * many})
search_action({"content": "<action>search[" * many})
tool_action({"content": "<tool_call>" * many})
same_text("1" * many + "x", "0.5")
choice("answer:" + " " * many, "C", ())
numeric("1" * many + "x", "5", ())
print("done")
"""
PROGRAM = f"""
import sys
from opdengine.config.train import SageConfig
from opdengine.methods.debate.prompts import parse_confidence
from opdengine.environments.actions import FORMATS, with_tool_calls
from opdengine.methods.sage_judge import Judge
from opdengine.types import Completion
from opdengine.verifiers import choice, exact_match, numeric
from opdengine.verifiers.math_answer import _last_words, _plain, _readable, final_answer
from opdengine.verifiers.program import CodeTests, extract_program, same_text
from opdengine.verifiers.reasoning_tasks import EVALUATED, extract_answer
import numpy as np

ask = [{{"role": "user", "content": "?\\nA. one\\nB. two\\nC. three"}}]
tests = CodeTests(test="f()", entry="f")
judge = Judge(SageConfig())
readers = {{
    "exact_match": lambda t: exact_match(t, "5", ask),
    "numeric": lambda t: numeric(t, "5", ask),
    "choice": lambda t: choice(t, "C", ask),
    "math": lambda t: (_readable(final_answer(t)), _last_words(final_answer(t)), _plain(final_answer(t))),
    "code": lambda t: extract_program(t, tests),
    "output": lambda t: same_text(t, "0.5 " * len(t.split())),
    "reasoning_gym": lambda t: [e.fullmatch(extract_answer(t)) for e in EVALUATED.values()],
    "confidence": parse_confidence,
    "judge": lambda t: judge.read(Completion(np.zeros(1), np.zeros(1), "stop", t)),
    "tools": lambda t: with_tool_calls({{"content": t}}),
    **{{f"format {{name}}": (lambda t, f=f: f({{"content": t}})) for name, f in FORMATS.items()}},
}}
for name, read in readers.items():
    for piece in sys.argv[2].split("|"):
        piece = piece.encode("latin-1", "backslashreplace").decode("unicode_escape")
        for end in {ENDS!r}:
            end = end.encode().decode("unicode_escape")
            print(name, repr(piece), repr(end), flush=True)
            read((piece * int(sys.argv[1]))[: int(sys.argv[1])] + end)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_reader_is_linear(part: int, tmp_path: Path) -> None:
    script = tmp_path / "readers.py"
    script.write_text(PROGRAM, "utf-8")
    pieces = "|".join(PIECES[part::8])
    run([sys.executable, str(script), str(SIZE), pieces])


def test_texts_that_took_hours_are_read_at_once(tmp_path: Path) -> None:
    script = tmp_path / "worst.py"
    script.write_text(WORST, "utf-8")
    run([sys.executable, str(script)])


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"no end of {(late.stdout or b'').decode().splitlines()[-1:]}")
    assert done.stdout.endswith("done\n"), done.stdout[-300:] + done.stderr[-2000:]
