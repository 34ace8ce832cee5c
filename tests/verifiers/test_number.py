r"""Numbers as models write them: ``1\,000`` is not 0, infinity is no reference, and nothing is computed for long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opdengine.types import Prompt
from opdengine.verifiers import load_verifier, numeric
from opdengine.verifiers.boxes import last_box
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.number import last_number, plain_digits
from opdengine.verifiers.score import VerifierSettings

NUMBERS = [
    ("5", 5), ("-5", -5), ("+5", 5), (".5", 0.5), ("5.", 5), ("1.000.", 1), ("So 5.", 5), ("1e3", 1000),
    ("1E-3", 0.001),
    ("1,000", 1000), ("1,000,000.5", 1e6 + 0.5), ("12,34,567", 1234567), ("(1,2)", 2), ("1,2", 2), ("1, 2", 2),
    (r"1\,000", 1000), (r"1{,}000", 1000), ("1 000", 1000), (r"1\ 000", 1000), (r"1\;000", 1000), (r"1,\!000", 1000),
    (r"1~000", 1000), (r"1\thinspace 000", 1000), ("1\u2009000", 1000), ("1\u202f000\u202f000", 1e6),
    ("1\u00a0000", 1000),
    ("1'000", 1000), (r"1 \, 000", 1000), (r"1\,000.5", 1000.5), (r"3.141\,592\,65", 3.14159265), ("12 34", 34),
    ("in 2020 100 people", 100), ("12345 678", 678), (r"\$5", 5), ("$5", 5), (r"5\%", 5), ("5%", 5),
    ("€5.50 each", 5.5),
    (r"\frac{1}{2}", 0.5), (r"-\dfrac{1}{2}", -0.5), (r"\frac{-1}{2}", -0.5), (r"\frac12", 0.5), (r"2\frac{1}{2}", 2.5),
    ("1/2", 0.5), ("-3 / 4", -0.75), ("½", 0.5), ("2½", 2.5), ("\u22125", -5), ("\u20135", -5), ("3-5", 5),
    ("x=-5", -5),
    (r"-\,5", -5), ("= - 5", -5), ("５", 5), ("\u0665", 5), ("１，０００", 1000), (r"1.5 \times 10^3", 1500),
    ("1.5×10³", 1500),
    (r"1.5 \cdot 10^{-3}", 0.0015), ("10^6", 1e6), ("2^{10}", 1024), ("2**3", 8), ("5²", 25), ("5 m^2", 5),
    ("x_1 = 7", 7),
    (r"5\,\text{cm}^2", 5), (r"\boxed{5} after 3 steps", 5), (r"\boxed{5\,000.}", 5000), (r"\boxed 5", 5),
    (r"\fbox{5}", 5),
]  # fmt: skip
NONE = [
    "",
    "no",
    "inf",
    "nan",
    "1e999999",
    "10**10**10",
    "9^9^9",
    "10^{99999999999}",
    "1/0",
    r"\frac{1}{0}",
    r"\boxed{x}",
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_read(text: str, value: float) -> None:
    assert last_number(text) == pytest.approx(value, rel=1e-12)
    assert numeric(f"The answer is {text}", value, ()) == 1


@pytest.mark.parametrize("text", [*NONE, "9" * 100_000, "1e" + "9" * 100_000, "2^" + "9" * 100_000])
def test_what_is_no_finite_number_is_none(text: str) -> None:
    assert last_number(text) is None
    assert numeric(text, 5, ()) == 0


def test_small_numbers_are_compared_relatively() -> None:
    assert numeric("9e-12", "1.6e-19", ()) == numeric("0", "1.6e-19", ()) == numeric("5e-7", "2e-7", ()) == 0
    assert numeric("1.6 * 10^-19", "1.6e-19", ()) == numeric("0.00020000000001", "2e-4", ()) == 1
    assert numeric("0.333333", "1/3", ()) == numeric("1e-9", 0, ()) == numeric("1e-9", "0.0", ()) == 1


def test_other_numbers_are_wrong() -> None:
    for text, answer in (
        (r"\boxed{1\,000}", 0),
        (r"\boxed{1\,000}", 1),
        ("3/4", 4),
        ("1.000", 1000),
        ("5", -5),
        ("10^3", 3),
    ):
        assert numeric(text, answer, ()) == 0, text


@pytest.mark.parametrize(
    "answer", ["inf", "-inf", "nan", "Infinity", "1e999", "", "x", None, float("inf"), float("nan"), 10**400, [5]]
)
def test_a_reference_that_is_no_finite_number_is_the_verifiers_failure(answer: Any) -> None:
    for text in ("5", "inf", "nan", "1e999"):
        (score,) = Grader("numeric").grade([text], [Prompt("p", (), answer=answer)])
        assert (score.value, score.failure) == (0, "error") and "not a finite number" in score.detail


@pytest.mark.parametrize("answer", ["1,000", "1000", 1000, 1000.0, r"1\,000", "$1000", np.float32(1000)])
def test_references_are_read_alike(answer: Any) -> None:
    assert numeric("1000", answer, ()) == 1 and numeric("1001", answer, ()) == 0


MATH = [
    ("1000", r"\boxed{1\,000}"), ("1000", r"\boxed{1{,}000}"), ("1000", r"\boxed{1 000}"), ("1000", r"\boxed{1\;000}"),
    ("1000", "\\boxed{1\u2009000}"), ("1000", "\\boxed{1\u202f000}"), ("1000", r"\boxed{1~000}"),
    ("1", r"\boxed{1.000.}"),
    ("1000000", r"\boxed{1\,000\,000}"), ("1000.5", r"\boxed{1\,000.5}"), ("5", r"\boxed{5.}"), ("5", r"\boxed{\$5}"),
    ("5", r"\boxed{5\%}"), ("1000", r"\boxed{1e3}"), ("0.5", r"\boxed{\dfrac{1}{2}}"), ("-5", "\\boxed{\u22125}"),
    ("5", "\\boxed{５}"), ("5", "\\boxed{\u0665}"), ("-1/2", r"\boxed{-\frac{1}{2}}"), ("1000", "The answer is 1 000."),
    ("1000", r"The answer is $1\,000$."), ("1000.", r"\boxed{1000}"), (r"1\,000", r"\boxed{1000}"), ("2", r"\fbox{2}"),
    ("5", r"\boxed{5\,\text{cm}}"), ("(1,2)", r"\boxed{(1,\,2)}"), ("5/2", r"\boxed{2\frac{1}{2}}"), ("5", r"\boxed 5"),
    (r"3\sqrt{2}", r"\boxed{3\,\sqrt{2}}"), (r"\{1,2\}", r"\boxed{\{1,2\}}"), ("25", "\\boxed{5²}"), ("1.5e3", "1500"),
]  # fmt: skip
NO_MATH = [
    ("0", r"\boxed{1\,000}"), ("1", r"\boxed{1\,000}"), ("000", r"\boxed{1 000}"), ("1", r"\boxed{1{,}000}"),
    ("12", r"\boxed{1,\,2}"), ("12", r"\boxed{1\,2}"), ("1000", r"\boxed{1.000}"), ("5", "\\boxed{\u22125}"),
    ("0", r"\boxed{1e999999}"), ("52", "\\boxed{5²}"), (r"\infty", r"\boxed{1e999999}"), ("5", r"\boxed{\text{nan}}"),
]  # fmt: skip


@pytest.fixture(scope="module")
def verify() -> Any:
    return load_verifier("math", VerifierSettings())


@pytest.mark.parametrize(("answer", "text"), MATH)
def test_math_reads_the_same_numbers(verify: Any, answer: str, text: str) -> None:
    score = verify(text, answer, ())
    assert (score.value, score.failure) == (1, ""), score


@pytest.mark.parametrize(("answer", "text"), NO_MATH)
def test_math_takes_no_part_of_a_number_for_it(verify: Any, answer: str, text: str) -> None:
    score = verify(text, answer, ())
    assert (score.value, score.failure) == (0, ""), score


def test_plain_digits_leave_other_text_alone() -> None:
    for text in (r"(1,\,2)", "1.5 and 2.", r"a\,b", "x – y", "[1, 2]", r"f'(1) = 2", "1 2 3", r"\{1,\,200\}"):
        assert plain_digits(text).rstrip(".") == text.rstrip(".")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("a", None), (r"\boxed{1}\boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1", ""), (r"\boxed {1}", "1"), (r"\boxed 12.", "12"), (r"\boxed{a\\}", r"a\\"), (r"\boxed{}", ""),
        (r"\boxed{" + "1" * 3000 + "}", ""), (r"\boxed{1} \fbox{2}", "2"), (r"\boxed", ""),
    ],
)  # fmt: skip
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box
