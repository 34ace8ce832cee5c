"""Numbers as people and models write them, and the verifier ``numeric``."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from opdengine.models.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.boxes import last_box
from opdengine.verifiers.score import NO_ANSWER, Reasoned

TOLERANCE = 1e-6
SMALL = 1e-3
"""Numbers from here on down, but 0, are compared relatively; of larger ones six decimals are enough."""
MAX_EXPONENT = 400
"""No power of a larger exponent is a float, unless it is 0 or 1."""

_SPACE = r"\\[,;:! ]|\\(?:thin|med|thick)space\b ?|~|[\u00a0\u2000-\u200a\u202f\u205f]"
_GROUP = rf"(?:\{{,\}}|,\\!|'|\u2019|[ ]?(?:{_SPACE})[ ]?|[ ])"
_GROUPED = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)")
_GROUPED_DECIMALS = re.compile(rf"(?<=\d\.)\d{{3}}(?:(?:{_SPACE})\d{{3}})*(?:{_SPACE})\d{{1,3}}(?!\d)")
_SPACED_SIGN = re.compile(rf"([-+])(?:{_SPACE})+(?=[\d.])")
_INNER_SIGN = re.compile(r"((?:^|[={($:])[ \t]*-)[ \t]+(?=[\d.])", re.MULTILINE)
_TRAILING_POINT = re.compile(r"(?<=\d)\.(?=\s*(?:[})\]$]|\\[)\]]|$))")
_DASH = re.compile("(?<![\\w)\\]}])\u2013(?=[\\d.\\\\])")
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_SUPERSCRIPT = re.compile(f"[{_SUPERSCRIPTS}]+")
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-", 0xFE63: "-", 0x2044: "/"}
_FROM_SUPERSCRIPT = str.maketrans(_SUPERSCRIPTS, "0123456789+-")

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_POWER = r"[ ]?(?:\^|\*\*)[ ]?(?:\{{[ ]?(?P<{0}>[-+]?\d+)[ ]?\}}|(?P<{0}_bare>[-+]?\d+))"
_EXPRESSION = re.compile(
    r"(?P<script>[\^_](?:\{[^{}\n]{0,100}\}|[-+]?\w+))"
    r"|(?<!\d)(?<!\d\.)(?P<sign>(?<![\w)\]}])[-+])?(?:(?P<whole>\d+)?\\frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
    rf"|(?P<number>{_NUMBER})(?:[eE](?P<e>[-+]?\d+))?(?:{_POWER.format('power')})?"
    rf"(?:[ ]?(?:\\times|\\cdot|[\u00d7\u00b7*x])[ ]?10{_POWER.format('ten')})?"
    rf"(?:[ ]?/[ ]?(?P<over>{_NUMBER})(?![/\d]))?)(?P<tower>[ ]?(?:\^|\*\*)[\d.{{}}^* +-]*)?"
)
_FRACTION = re.compile(r"\\[dtc]?frac[ ]?(?:\{[ ]?([-+]?\d+)[ ]?\}|(\d))[ ]?(?:\{[ ]?(\d+)[ ]?\}|(\d))")


def plain_digits(text: str) -> str:
    r"""The text with its numbers in one form: ``1\,000``, ``1{,}000`` and ``1 000`` become ``1000``.

    Digits, signs and full-width characters of other scripts become those of ASCII, superscripts ``^{...}``; LaTeX's
    spacing behind a sign and a point behind a number at the end of a formula go.
    """
    if not text.isascii():
        text = _DASH.sub("-", text.translate(_WIDE))
        text = _SUPERSCRIPT.sub(lambda found: f"^{{{found[0].translate(_FROM_SUPERSCRIPT)}}}", text)
        text = "".join(map(_plain_character, text))
    text = _GROUPED.sub(lambda found: re.sub(r"\D|\\\w+", "", found[0]), text)
    text = _GROUPED_DECIMALS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _SPACED_SIGN.sub(r"\1", text)
    return _TRAILING_POINT.sub("", _INNER_SIGN.sub(r"\1", text))


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) == "No" and "fraction" in unicodedata.decomposition(character):
        top, _, bottom = unicodedata.normalize("NFKC", character).partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}" if bottom else character
    return character


def last_number(text: str) -> float | None:
    r"""The last number in a text, or None: 5, -1,000.5, ``\frac{1}{2}``, 3/4, 1.5e3, ``1.5 \times 10^{3}``, 2^10.

    Where there is a ``\boxed{...}`` it is looked for in the last one only. What cannot be said as a finite float,
    and powers of powers, are no numbers. Exponents and subscripts of other things are none either.
    """
    box = last_box(text)
    text = _FRACTION.sub(_plain_fraction, plain_digits(text if box is None else box))
    last = None
    for found in _EXPRESSION.finditer(text):
        if not found["script"]:
            last = found
    value = math.nan if last is None else _value(last)
    return value if math.isfinite(value) else None


def _plain_fraction(found: re.Match[str]) -> str:
    """With the sign of the numerator before it, and braces around both numbers."""
    top, bottom = found[1] or found[2], found[3] or found[4]
    sign = "-" if top.startswith("-") else ""
    return rf"{sign}\frac{{{top.lstrip('+-')}}}{{{bottom}}}"


def _value(found: re.Match[str]) -> float:
    try:
        if found["tower"]:
            return math.nan
        sign = -1.0 if found["sign"] == "-" else 1.0
        if found["top"]:
            return sign * (float(found["whole"] or 0) + float(found["top"]) / float(found["bottom"]))
        value = float(f"{found['number'].replace(',', '')}e{found['e'] or 0}")
        if power := found["power"] or found["power_bare"]:
            value **= _exponent(power)
        if ten := found["ten"] or found["ten_bare"]:
            value *= 10.0 ** _exponent(ten)
        if found["over"]:
            value /= float(found["over"].replace(",", ""))
        return sign * value
    except (OverflowError, ZeroDivisionError, ValueError):
        return math.nan


def _exponent(digits: str) -> int:
    """
    Raises:
        OverflowError: no float is raised to such a power.
    """
    if len(digits) > 4 or abs(int(digits)) > MAX_EXPONENT:
        raise OverflowError(f"the exponent {digits:.20} is too large")
    return int(digits)


def numeric(text: str, answer: Any, messages: Sequence[Message]) -> float:
    """1 when the last number of the text, behind its thoughts, equals the answer to 1e-6: relative to it where it is
    above 1 or, but for 0, below 1e-3.

    Signs of currencies, percent and units are passed over.

    Raises:
        ValueError: the reference answer is not a finite number.
    """
    target = last_number(answer) if isinstance(answer, str) else _finite(answer)
    if target is None:
        raise ValueError(f"the reference answer {answer!r:.200} is not a finite number")
    part = answer_part(text)
    if part is None:
        return NO_ANSWER
    found = last_number(part)
    if found is None:
        return Reasoned(0.0, "no number in the answer")
    size = abs(target)
    return float(abs(found - target) <= TOLERANCE * (size if 0 < size < SMALL else max(1.0, size)))


def _finite(answer: Any) -> float | None:
    try:
        value = float(answer)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
