"""Types of settings: what is read as text, number or truth value, and where a number may lie.

Values come from YAML or the command line (:class:`opdengine.config.yaml_text.Written`), or from Python.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema, core_schema

from opdengine.config.yaml_text import BARE, Written, plain
from opdengine.errors import ConfigError
from opdengine.workers.printing import brief, one_line

T = TypeVar("T")

LIKE_OCTAL = re.compile(r"[-+]?0[0-9_]+")
WHOLE = re.compile(r"[-+]?[0-9_]{1,400}")
NO_TEXT = re.compile("[\x00\ud800-\udfff]")
VARIABLE = re.compile(r"\$(\w+|\{\w+\})(/|$)")
"""A variable of the shell in a path."""
TEMPLATE = re.compile(r"\{\{|\{%|\n")
"""What no path has, but a Jinja template."""

WRONG_TYPE = "{key}={value} has the wrong type; expected "
IMPOSSIBLE = "{key}={value} is not possible; "


class Refused(ConfigError):
    """A value that a setting cannot have; a section that is built makes it an error with the setting's whole name.

    Args:
        message: with ``{key}`` and ``{value}`` for the setting's whole name and what it was given.
        at: the setting or item below the one that is being read, where the value stands.
        value: shown in place of what was given.
    """

    def __init__(self, message: str, at: str = "", value: Any = BARE) -> None:
        super().__init__(message.replace("{key}", at).replace("{value}", brief(value)))
        self.message, self.at, self.value = message, at, value


def unwrapped(value: Any) -> Any:
    """What :class:`Written` holds where it is a list or a mapping."""
    if isinstance(value, Written):
        if value.value is BARE:
            raise Refused("--{key} needs a value: --{key} VALUE")
        return value.value if isinstance(value.value, (Mapping, list)) else value
    return value


def _text(value: Any) -> str:
    """Text as it was written."""
    value = unwrapped(value) if isinstance(value, Written) and value.value is BARE else value
    if isinstance(value, Written):
        value = value.text
    if isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool):
        value = brief(value) if isinstance(value, int) else str(value)
    if not isinstance(value, str):
        raise Refused(WRONG_TYPE + "text")
    _require_characters(value)
    return value


def _require_characters(value: Any, at: str = "") -> None:
    """Refuse text, at any depth, that cannot be written to a file."""
    if isinstance(value, str) and (found := NO_TEXT.search(value)):
        character = found[0].encode("unicode_escape").decode()
        raise Refused(f"{{key}} holds the character {character}, which no text has", at)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _require_characters(key, at)
        _require_characters(item, f"{at}.{one_line(str(key), 80)}".lstrip("."))


def _number(kind: type[int] | type[float], value: Any) -> int | float:
    """A number from what YAML reads as a number or, in quotes, as text; whole ones keep all digits."""
    given = plain(unwrapped(value))
    if isinstance(given, str):
        text = given.strip()
        if LIKE_OCTAL.fullmatch(text):
            raise Refused(f"{{key}}={text} could be an octal number; write it without the 0 at its beginning")
        with suppress(ValueError):
            given = int(text) if WHOLE.fullmatch(text) else float(text)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        with suppress(ValueError, OverflowError):
            if kind is float or int(given) == given:
                return kind(given)
    raise _wrong_type(kind, value)


def _flag(value: Any) -> bool:
    """A truth value; an argument without a value is true."""
    given = plain(value)
    if given is BARE:
        return True
    word = given.strip().lower() if isinstance(given, str) else ""
    if not isinstance(given, bool) and word not in ("true", "false"):
        raise _wrong_type(bool, value)
    return given if isinstance(given, bool) else word == "true"


def _wrong_type(kind: type, value: Any) -> Refused:
    empty = isinstance(value, Written) and not value.text
    return Refused("--{key}= needs a value" if empty else WRONG_TYPE + kind.__name__)


def _list(value: Any) -> list[Any]:
    """A list; a single value stands for a list of it."""
    value = unwrapped(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _mapping(value: Any) -> Any:
    value = unwrapped(value)
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else value


def _free(value: Any) -> Any:
    value = plain(_mapping(value))
    _require_characters(value)
    return value


def _null(value: Any) -> Any:
    return None if isinstance(value, str) and value == "null" else value


def _filled(remedy: str, value: str) -> str:
    if not value.strip():
        raise Refused(f"{IMPOSSIBLE}it must not be empty{remedy}", value=value)
    return value


def at_home(path: Any) -> Any:
    """A path with ``~`` and ``~user`` written out; anything else is left as it is.

    Raises:
        ConfigError: there is no such user, or the path has a variable of the shell in it.
    """
    if not isinstance(path, str):
        return path
    if VARIABLE.search(path) and not TEMPLATE.search(path) and not os.path.exists(path):
        raise ConfigError(f"the path {path!r}: variables of the shell are not filled in here; write the path out")
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ConfigError(f"the folder {path!r}: there is no user {path.split('/')[0][1:]!r}; write the path out")
    return found


@dataclass(frozen=True)
class Range:
    """Where a number, or every number of a list, may lie.

    Args:
        low, high: the ends; they belong to it.
        open_low, open_high: they do not.
        also: values that are possible besides, such as 0 or ``math.inf``.
        remedy: what the message says in place of the ends.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    also: tuple[float, ...] = ()
    remedy: str = ""

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """What a value must be."""
        low = f"it must be {'above' if self.open_low else 'at least'} {self.low:.12g}"
        ends = f"{low} and {'below' if self.open_high else 'at most'} {self.high:.12g}"
        others = "".join(f", or {value:g}" for value in self.also)
        return self.remedy or f"{ends}{others}"

    @property
    def interval(self) -> str:
        """The range in mathematical notation."""
        low, high = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{low}{self.low:.12g}, {self.high:.12g}{high}" + "".join(f" or {value:g}" for value in self.also)

    def _check(self, value: Any) -> Any:
        if not all(number in self for number in (value if isinstance(value, list) else [value])):
            raise Refused(IMPOSSIBLE + str(self), value=value)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's hook of an annotation: the number is checked once it has been read."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))


def _shape(value: Any) -> str:
    """Which part of a union a value is meant for."""
    given = value.value if isinstance(value, Written) else value
    if isinstance(given, Mapping) or dataclasses.is_dataclass(given):
        return "<a mapping>"
    if isinstance(given, (list, tuple)):
        return "<a list>"
    return "<no type>" if value is None or isinstance(value, bool) else "<text>"


Text = Annotated[str, BeforeValidator(_text)]
Name = Annotated[Text, AfterValidator(partial(_filled, ""))]
"""Text that must not be empty."""
Filled = Annotated[Text, AfterValidator(partial(_filled, "; leave it out"))]
"""Text that says something where it is given."""
NeededPath = Annotated[Name, AfterValidator(at_home)]
FilledPath = Annotated[Filled, AfterValidator(at_home)]
Choice = Annotated[T, BeforeValidator(_text)]
"""One word of a ``Literal``."""
Integer = Annotated[int, BeforeValidator(partial(_number, int))]
Real = Annotated[float, BeforeValidator(partial(_number, float))]
Flag = Annotated[bool, BeforeValidator(_flag)]
Listed = Annotated[list[T], BeforeValidator(_list)]
Mapped = Annotated[dict[Text, T], BeforeValidator(_mapping)]
Free = Annotated[dict[str, Any], BeforeValidator(_free)]
"""Keywords for code that is not ours: plain values of any kind."""
Maybe = Annotated[T | None, BeforeValidator(_null)]
"""A setting that may be null."""
PerKey = Annotated[
    Annotated[T, Tag("<text>")] | Annotated[Mapped[T], Tag("<a mapping>")],
    Discriminator(_shape),
]
"""One value, or a mapping from routing key (and "default") to values."""
AsText = Tag("<text>")
AsList = Tag("<a list>")
AsMapping = Tag("<a mapping>")
BY_SHAPE = Discriminator(_shape)
"""With :data:`AsText`, :data:`AsList` and :data:`AsMapping` tells the parts of a union apart."""

COUNT = Range(1, 10**9)
TOP_P = Range(0, 1, open_low=True, remedy="it lies in (0, 1]; 1 keeps every token")
TOP_K = Range(0, 10**9, remedy="it must not be negative; 0 keeps every token")

Count = Annotated[Integer, COUNT]
CountOrNone = Annotated[Integer, Range(0, 10**9)]
Seed = Annotated[Integer, Range(0, 2**62)]
Seconds = Annotated[Real, Range(1e-3, 1e7, remedy="it is a number of seconds, at most 1e7")]
TEMPERATURE = Range(0.01, 100, also=(0,), remedy="it must be 0 (greedy) or lie between 0.01 and 100")
Temperature = Annotated[Real, TEMPERATURE]
TopP = Annotated[Real, TOP_P]
TopK = Annotated[Integer, TOP_K]
Penalty = Annotated[Real, Range(0.01, 100, remedy="it must lie between 0.01 and 100; 1 is off")]
Factor = Annotated[Real, Range(0, 1e6)]
Positive = Annotated[Real, Range(1e-6, 1e6)]
PositiveOrInf = Annotated[Real, Range(1e-6, 1e6, also=(math.inf,))]
Share = Annotated[Real, Range(0, 1)]
