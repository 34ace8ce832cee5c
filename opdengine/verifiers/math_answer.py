"""The ``math`` verifier: is the final answer mathematically the reference? (``pip install "opdengine[math]"``)

Parsing and comparison are math-verify's (LaTeX, sets, intervals, matrices, equations, units of percent).
"""

from __future__ import annotations

import contextlib
import logging
import re
import resource
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from opdengine.models.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.boxes import last_box
from opdengine.verifiers.number import plain_digits
from opdengine.verifiers.score import NO_ANSWER, Score, VerifierSettings, as_score

SECONDS = 5.0
MEMORY_BYTES = 2 << 30
TAIL_CHARACTERS = 4000
LEAD_IN = re.compile(r"answer(?: is)?[ \t*_]*:?[ \t*_]+", re.IGNORECASE)
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?![\w.])")
TEXT_MARK = re.compile(r"\\(?:boxed|text|textbf|textit|mathrm|mathbf)\s*\{")
WORDS = re.compile(r"[^\W\d_]+(?:[ -][^\W\d_]+)*")


class _OutOfTime(BaseException):
    """Not an Exception: the libraries below swallow those."""


class MathVerifier:
    r"""1 when the completion's final answer equals the reference (or one of a list), else 0.

    What stands behind the thoughts counts; in it the last ``\boxed{...}``, else the last formula or number.
    References are LaTeX or plain text, with or without ``$`` or ``\boxed``. Where the reference is a word,
    words are compared, not the products of their letters.

    Runs in the main thread of a process only. An expression that takes more than five seconds or two GiB
    (``9^{9^{9^9}}``) is no answer.

    Args:
        settings: a shorter time limit holds here, too.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self, settings: VerifierSettings) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ValueError('the verifier "math" needs math-verify: pip install "opdengine[math]"') from error
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._library = math_verify
        self._seconds = min(SECONDS, settings.timeout)

    def __call__(self, text: str, answer: Any, messages: Sequence[Message]) -> Score:
        """Grade one completion."""
        if answer_part(text) is None:
            return as_score(NO_ANSWER)
        found = final_answer(text)
        references = answer if isinstance(answer, (list, tuple)) else [answer]
        try:
            with _limits(self._seconds):
                return Score(float(any(self._equal(str(reference), found) for reference in references)))
        except _OutOfTime:
            return Score(0.0, "timeout", f"no comparison of {found!r:.200} within {self._seconds:g} s")

    def _equal(self, reference: str, found: str) -> bool:
        if WORDS.fullmatch(word := _plain(reference)):
            return word.casefold() == _plain(_last_words(found)).casefold()
        reference = _readable(reference.replace(r"\$", ""))
        marked = reference if re.search(r"\$|\\\(|\\\[|\\boxed", reference) else rf"\boxed{{{reference}}}"
        gold = self._library.parse(marked, parsing_timeout=None)
        if not gold:
            raise ValueError(f"the reference answer {reference!r} cannot be parsed")
        target = self._library.parse(_readable(found), parsing_timeout=None)
        return bool(self._library.verify(gold, target, timeout_seconds=None))


def final_answer(text: str) -> str:
    r"""The part of a completion that is its answer: the last ``\boxed{...}``, else its end."""
    text = answer_part(text) or ""
    box = last_box(text)
    if box is None:
        return text[-TAIL_CHARACTERS:]
    return rf"\boxed{{{box}}}" if box else ""


def _readable(text: str) -> str:
    """Numbers in the one form that the parser knows; ``1e3`` as a power of ten."""
    return SCIENTIFIC.sub(r"\1 \\times 10^{\2}", plain_digits(text))


def _last_words(text: str) -> str:
    """Return the text behind the last "answer is" or the last line break."""
    text = text.rstrip()
    line = text[text.rfind("\n") + 1 :]
    begins = [found.end() for found in LEAD_IN.finditer(line) if found.end() < len(line)]
    return line[begins[-1] :] if begins else line


def _plain(answer: str) -> str:
    """An answer without LaTeX's marks of text."""
    answer = answer.strip().strip("$").strip()
    while (mark := TEXT_MARK.match(answer)) and answer.endswith("}"):
        answer = answer[mark.end() : -1].strip()
    return answer.strip(" .()*")


@contextlib.contextmanager
def _limits(seconds: float) -> Iterator[None]:
    """Bound time and memory of what happens inside, as far as Python gets to run there."""

    def interrupt(*_: object) -> None:
        raise _OutOfTime

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        used = _data_bytes()
        limit = used + MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(used + MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _data_bytes() -> int:
    """Bytes of this process that RLIMIT_DATA counts."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
