"""What a section of settings is: a frozen pydantic dataclass whose fields carry type, bounds, help and marks.

The text below a field is its help (``opdengine settings``, ``docs/settings.md``); :data:`Resumable` and its siblings,
and :class:`Elsewhere`, are marks. A new setting is one such field, and has to be used by something.
"""

from __future__ import annotations

import difflib
import functools
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar, cast, dataclass_transform

import pydantic.dataclasses
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from opdengine.config.fields import IMPOSSIBLE, WRONG_TYPE, Range, Refused, unwrapped
from opdengine.config.secrecy import names_secret, refuse_secrets
from opdengine.config.yaml_text import BARE, Written
from opdengine.errors import ConfigError
from opdengine.workers.printing import brief, one_line

T = TypeVar("T")

RESUMABLE, CHANGEABLE, BY_CONTENT, EXTENDABLE = "resumable", "changeable", "by content", "extendable"
MARKS = (RESUMABLE, CHANGEABLE, BY_CONTENT, EXTENDABLE)
"""What a resumed run may have differently; a setting without a mark takes that of its section, and else stays."""

Resumable = Annotated[T, RESUMABLE]
"""A setting that a resumed run may have differently: it does not change what is learned."""
Changeable = Annotated[T, CHANGEABLE]
"""A setting that a resumed run may have differently with ``allow_changes``: it changes what is learned from there on,
and neither the order of the data nor which numbers are trained."""
ByContent = Annotated[T, BY_CONTENT]
"""A place, which a resumed run may have differently where the same lies there."""
Extendable = Annotated[T, EXTENDABLE]
"""The length of a run, which a resumed run may have differently; it then says what becomes of the schedule."""


@dataclass(frozen=True)
class Elsewhere:
    """Marks a setting with the names that it has in transformers and TRL, or that mean something near it there.

    Args:
        names: each with what follows the name here in the message; may be empty.
    """

    names: dict[str, str] = field(default_factory=dict)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a section: its values are checked however it is built, and errors are :class:`ConfigError`."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    made = cast(type[T], pydantic.dataclasses.dataclass(frozen=True, config=config)(cls))
    validated = made.__init__

    @functools.wraps(validated)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            validated(self, *args, **values)
        except ValidationError as error:
            raise refusal(made, error) from None

    made.__init__ = __init__  # type: ignore[method-assign]
    return made


@settings
class Section:
    """A part of the settings; messages name its keys as the user writes them."""

    section: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _unwrapped(cls, value: Any) -> Any:
        return unwrapped(value)

    def need(self, ok: bool, name: str, remedy: str, value: Any = BARE) -> None:
        """Refuse the value of a setting unless ``ok``; called while the section is built."""
        if not ok:
            raise Refused(IMPOSSIBLE + remedy, name, getattr(self, name) if value is BARE else value)


def read(cls: type[T], data: Any) -> T:
    """A section from plain or written values.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not possible.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        raise refusal(cls, error, read=True) from None


def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """The settings of a section by name, with help and marks."""
    found: dict[str, FieldInfo] = cls.__pydantic_fields__
    return found


@functools.cache
def section_in(cls: Any, name: str) -> type[Section] | None:
    """The section that a setting is, lists, or may be."""

    def search(hint: Any) -> type[Section] | None:
        if isinstance(hint, type) and issubclass(hint, Section):
            return hint
        return next((found for part in typing.get_args(hint) if (found := search(part)) is not None), None)

    return search(typing.get_type_hints(cls).get(name))


def mark_of(info: FieldInfo) -> str | None:
    """What a resumed run may do with a setting: one of :data:`MARKS`, or None."""
    return next((mark for mark in info.metadata if isinstance(mark, str) and mark in MARKS), None)


def range_of(info: FieldInfo) -> Range | None:
    """Where a number may lie."""

    def search(hint: Any) -> Range | None:
        if isinstance(hint, Range):
            return hint
        parts = (*typing.get_args(hint), *getattr(hint, "__metadata__", ()))
        return next((found for part in parts if (found := search(part)) is not None), None)

    return search(Annotated[(info.annotation, *info.metadata)]) if info.metadata else search(info.annotation)


def every_setting(cls: Any, place: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings, also those of sections, by dotted name; the first item stands for all of a list."""
    hints = typing.get_type_hints(cls)
    for name, info in fields_of(cls).items():
        yield place + name, info
        if (inner := section_in(cls, name)) is not None:
            item = ".0" if typing.get_origin(hints[name]) is list else ""
            yield from every_setting(inner, f"{place}{name}{item}.")


def elsewhere(cls: Any) -> dict[str, str]:
    """Names of transformers and TRL, with what to write here."""
    return {
        other: name + note
        for name, info in every_setting(cls)
        for mark in info.metadata
        if isinstance(mark, Elsewhere)
        for other, note in mark.names.items()
    }


# ------------------------------------------------------------------------------------------------ messages

UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
QUOTED = "'(.*?)'"
KINDS = {"dataclass_type": "a mapping", "dict_type": "a mapping"}


def refusal(cls: Any, error: ValidationError, read: bool = False) -> ConfigError:
    """The first thing that is wrong, in one sentence: names first, then values in the order of the settings.

    Args:
        cls: the section that was built; its name stands before the keys of its values.
        error: of pydantic.
        read: the section was read from a mapping of its own; else its name stands before unknown and missing keys, too.
    """
    errors = error.errors(include_url=False)
    root = f"{cls.section}." if cls.section else ""
    outer = "" if read else root
    if unknown := next((e for e in errors if e["type"] in UNKNOWN), None):
        return _unknown(cls, outer, unknown["loc"])
    missing = [e["loc"] for e in errors if e["type"] == "missing"]
    if beside := [place for place in missing if place[:-1] == missing[0][:-1]]:
        return ConfigError(f"missing setting {', '.join(repr(outer + _dotted(place)) for place in beside)}")
    return _impossible(root, errors[0])


def _dotted(place: Sequence[str | int]) -> str:
    """A place as the user writes it, without the marks of unions and of keys."""
    return ".".join(one_line(str(part), 80) for part in place if not re.fullmatch(r"<.*>|\[key\]", str(part)))


def _unknown(cls: Any, root: str, place: Sequence[str | int]) -> ConfigError:
    for part in place[:-1]:
        cls = cls if isinstance(part, int) or part.startswith("<") else section_in(cls, part)
    where, key = root + _dotted(place[:-1]), str(place[-1])
    where = f"{where.rstrip('.')}." if where else ""
    return ConfigError(f"unknown setting {one_line(where + key)!r}; {_hint(key, cls, where)}")


def _hint(key: str, cls: Any, where: str) -> str:
    if not where and (here := elsewhere(cls).get(key)):
        return f"here it is {here}"
    if names_secret(key):
        return "keys are no settings: name the environment variable that holds it with api_key_env of a teacher"
    if not where and (inside := [setting for setting, _ in every_setting(cls) if setting.endswith(f".{key}")]):
        return f"name its section, too: {' or '.join(map(repr, inside))}"
    options = () if where else ("config",)
    if close := difflib.get_close_matches(key[:100], [*fields_of(cls), *options], n=1):
        return f"did you mean {('--' if close[0] in options else where) + close[0]!r}?"
    return "'opdengine settings' lists all"


def _impossible(root: str, error: ErrorDetails) -> ConfigError:
    context, place, value = error.get("ctx", {}), root + _dotted(error["loc"]), error["input"]
    why = context.get("error")
    if isinstance(why, Refused):
        place = f"{place.rstrip('.')}.{why.at}".strip(".") if why.at else place
        message, value = why.message, value if why.value is BARE else why.value
    elif isinstance(why, ConfigError):
        return ConfigError(f"{place.rstrip('.')}: {why}" if place else str(why))
    elif error["type"] == "literal_error":
        message = IMPOSSIBLE + f"choose one of {re.findall(QUOTED, context['expected'])}"
    elif error["type"] == "union_tag_invalid":
        message = WRONG_TYPE + " or ".join(re.findall("<(.*?)>", context["expected_tags"]))
    else:
        kind = KINDS.get(error["type"])
        message = WRONG_TYPE + kind if kind else IMPOSSIBLE + error["msg"]
    shown = _shown(place, value)
    return ConfigError(message.replace("{key}", place).replace("{value}", shown))


def _shown(place: str, value: Any) -> str:
    """A value for a message; a secret is refused as one, and what has the name of a secret is not shown."""
    text = value.text if isinstance(value, Written) else value
    refuse_secrets({place: text} if isinstance(text, str) and not names_secret(place.rpartition(".")[2]) else {})
    if names_secret(place.rpartition(".")[2]):
        return "..."
    return one_line(value.text) if isinstance(value, Written) else brief(value)
