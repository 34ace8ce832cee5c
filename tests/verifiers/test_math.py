"""Mathematical answers in the forms that people and models write them; nothing that they write stops a run."""

from __future__ import annotations

from typing import Any

import pytest

from opdengine.types import Prompt
from opdengine.verifiers import load_verifier
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.math_answer import final_answer
from opdengine.verifiers.score import VerifierSettings

RIGHT = [
    ("2", "so \\boxed{2}"),
    (4, "\\boxed{4}"),
    ("1,000", "\\boxed{1000}"),
    ("1000", "\\boxed{1,000}"),
    ("1/2", "\\boxed{0.5}"),
    ("\\frac12", "$\\frac{2}{4}$"),
    ("$\\frac{1}{2}$", "The answer is 1/2."),
    ("\\boxed{3}", "\\boxed{3}"),
    ("x^2+1", "\\boxed{1+x^2}"),
    ("(1,2)", "\\boxed{(1, 2)}"),
    ("2, 3", "\\boxed{3,2}"),
    ("3\\sqrt{2}", "\\boxed{\\sqrt{18}}"),
    ("-4", "the answer is -4."),
    ("50%", "\\boxed{0.5}"),
    ("50\\%", "\\boxed{50\\%}"),
    ("[1,2)", "\\boxed{x \\in [1,2)}"),
    ("10^{6}", "\\boxed{1000000}"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}}"),
    ("\\infty", "\\boxed{\\infty}"),
    (["1", "2"], "\\boxed{2}"),
    ("x=3", "\\boxed{3}"),
    ("90^\\circ", "\\boxed{90}"),
    ("5 \\text{ cm}", "\\boxed{5}"),
    ("\\$5", "\\boxed{5}"),
    ("\\text{(A)}", "\\boxed{A}"),
    ("\\text{even}", "\\boxed{Even}"),
    ("Evelyn", "It is \\boxed{\\text{Evelyn}}"),
    ("Yes", "Well.\nThe answer is: Yes."),
    ("2", "<think>\\boxed{3}</think> \\boxed{2}"),
    ("2", "\\boxed{\\frac{\\sqrt{16}}{2}} is it"),
]
WRONG = [
    ("2", "\\boxed{3}"),
    ("2", "\\boxed{2}, or rather \\boxed{1}"),
    ("2", "\\boxed{1}\\boxed{2}\\boxed{3}"),
    ("2", "\\boxed{1, 2, 3}"),
    ("2", "\\boxed{2 \\text{ or } 3}"),
    ("(1,2)", "\\boxed{(2,1)}"),
    ("Evelyn", "\\boxed{nylevE}"),
    ("Yes", "\\boxed{No}"),
    ("Yes", "Yes or no"),
    ("2", "<think>\\boxed{2}</think> \\boxed{3}"),
    ("2", "\\boxed{2"),
    ("2", "\\boxed{}"),
    ("2", ""),
    ("2", "I do not know."),
    ("0.333", "\\boxed{1/3}"),
    ("2", "{" * 100_000),
    ("2", "\\boxed{" * 3000),
    ("2", "(" * 20_000 + "2"),
    ("2", "\\boxed{" + "9" * 100_000 + "}"),
    ("2", "\\boxed{__import__('os').system('exit 1')}"),
]


@pytest.fixture(scope="module")
def verify() -> Any:
    verifier = load_verifier("math", VerifierSettings())
    return lambda text, answer: verifier(text, answer, ())


@pytest.mark.parametrize(("answer", "text"), RIGHT)
def test_equal_answers_pass(verify: Any, answer: Any, text: str) -> None:
    score = verify(text, answer)
    assert (score.value, score.failure) == (1, ""), score


@pytest.mark.parametrize(("answer", "text"), WRONG, ids=range(len(WRONG)))
def test_other_answers_do_not(verify: Any, answer: Any, text: str) -> None:
    score = verify(text, answer)
    assert (score.value, score.failure) == (0, ""), score


def test_answers_that_cannot_be_computed_end_with_the_time_limit() -> None:
    endless = ["\\boxed{9^{9^{9^9}}}", "\\boxed{9^{9^9}}", "\\boxed{(100000!)!}", "\\boxed{1^{10^{10^{10}}}}"]
    with Grader("math", VerifierSettings(timeout=1.5, workers=2)) as grader:
        scores = grader.grade([*endless, "\\boxed{5}"], [Prompt("p", (), answer="5")] * 5)
    assert [s.value for s in scores] == [0, 0, 0, 0, 1]
    assert {s.failure for s in scores[:4]} <= {"timeout", "crash", ""} and "timeout" in {s.failure for s in scores}


def test_a_reference_that_cannot_be_read_is_the_verifiers_failure() -> None:
    with Grader("math", VerifierSettings(workers=1)) as grader:
        (score,) = grader.grade(["\\boxed{2}"], [Prompt("p", (), answer="")])
    assert score.failure == "error" and "the reference answer '' cannot be parsed" in score.detail


def test_the_last_box_is_the_answer() -> None:
    assert final_answer("a \\boxed{1} b \\boxed{\\frac{1}{2}} c") == "\\boxed{\\frac{1}{2}}"
    assert final_answer("x" * 9000 + " 42")[-3:] == " 42"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("C", 1), ("(C)", 1), ("C. The third", 1), ("The answer is (C).", 1), ("Answer: C", 1),
        ("**Answer:** C", 1), ("the best option is C", 1), ("\\boxed{C}", 1), ("\\boxed{\\text{C. third}}", 1),
        ("Answer: A\nAnswer: C", 1), ("The answer is **C**", 1), ("<think>Answer: A</think>C", 1),
        ("Answer: A", 0), ("A patient with C", 0), ("Cats", 0), ("", 0), ("The answer is A, not C", 0),
        ("<think>answer: C</think>B", 0), ("ABCDE", 0), ("The answer is clear", 0),
    ],
)  # fmt: skip
def test_the_chosen_letter_is_found(text: str, score: float) -> None:
    assert load_verifier("choice")(text, "C", ()) == score
