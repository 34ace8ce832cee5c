"""The page of all settings (``docs/settings.md``), written from the settings themselves.

``python -m opdengine.tools.reference docs/settings.md`` writes the page anew.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opdengine.config.fields import Range
from opdengine.config.section import (
    BY_CONTENT,
    CHANGEABLE,
    EXTENDABLE,
    RESUMABLE,
    Section,
    fields_of,
    mark_of,
    range_of,
    section_in,
)
from opdengine.config.train import TrainConfig
from opdengine.tools.explain import by_method, default_of, in_yaml

HEAD = """\
# Settings

Every setting of a run, as `opdengine settings` explains them at the command line. A setting stands in the YAML file, or
is given as `--key value`; in a section as `--section.key value`, of the first teacher as `--teachers.0.key value`.

- A default that a method's paper sets otherwise is shown with the method; `opdengine settings method.NAME` cites it.
- A run that is resumed may have settings marked with ↻ otherwise than before; they do not change what is learned. With
  `--allow_changes` it may also have those marked with ✎ otherwise: they change what is learned from there on, but not
  the order of the data. Paths of models and data (⌂) may be others where the same lies there: see [Runs](runs.md).
- The page is written by `python -m opdengine.tools.reference docs/settings.md`."""
GROUPS = {
    "model": "What is learned from whom",
    "dtype": "The student",
    "eval_data": "Evaluation, data and grading",
    "temperature": "Sampling",
    "per_device_train_batch_size": "The update",
    "logging_steps": "Records, checkpoints and limits",
}
"""Headings, by the first setting below them."""

SIGNS = {RESUMABLE: " ↻", EXTENDABLE: " ↻", CHANGEABLE: " ✎", BY_CONTENT: " ⌂"}
"""What a resumed run may do with a setting."""

TABLE = "\n| setting | values | default | meaning |\n|---|---|---|---|"


KINDS = {str: "text", bool: "`true` or `false`", int: "integer", float: "number", dict: "mapping", list: "list"}


def reference() -> str:
    """The whole page in Markdown."""
    lines = [HEAD, *_table(TrainConfig, "")]
    shown: set[type] = set()
    for name in fields_of(TrainConfig):
        section = section_in(TrainConfig, name)
        if section is not None and section not in shown:
            shown.add(section)
            doc = _code(" ".join((section.__doc__ or "").split()))
            mark = mark_of(fields_of(TrainConfig)[name])
            lines += ["", f"## `{name}`", "", doc, TABLE, *_table(section, f"{name}.", mark)]
    return "\n".join(lines) + "\n"


def _table(cls: Any, place: str, outer: str | None = None) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        info = fields_of(cls)[field.name]
        if not place and field.name in GROUPS:
            yield from ["", f"## {GROUPS[field.name]}", TABLE]
        name = f"`{field.name}`" + SIGNS.get(mark_of(info) or outer or "", "")
        section = section_in(cls, field.name)
        kind = _kind(hints[field.name], range_of(info)) if section is None else _link(section, hints[field.name])
        default = "" if section is not None else _default(field, place)
        cells = [name, kind, default, _code(" ".join((info.description or "").split()))]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(hint: Any, bounds: Range | None) -> str:
    """What a setting may be, in few words."""
    shape, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if shape is typing.Literal:
        return ", ".join(f"`{word}`" for word in parts)
    if shape in (typing.Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else _kind(part, bounds) for part in parts)
    if shape is list:
        return f"list: {_kind(parts[0], bounds)}"
    return KINDS.get(shape, "") + (f" {bounds.interval}" if bounds is not None else "")


def _link(section: type[Section], hint: Any) -> str:
    """Where the settings of a section stand on the page."""
    name = next(name for name in fields_of(TrainConfig) if section_in(TrainConfig, name) is section)
    many = typing.get_origin(hint) is list
    return ("paths or " if many and str in typing.get_args(typing.get_args(hint)[0]) else "") + (
        f"list of [sections](#{name})" if many else f"[section](#{name})"
    )


def _default(field: dataclasses.Field[Any], place: str) -> str:
    default = default_of(field)
    shown = "needed" if default is dataclasses.MISSING else f"`{in_yaml(default)}`"
    papers = {f"`{value}`": methods for value, methods in by_method(place + field.name).items()}
    return shown + "".join(f"; {', '.join(methods)}: {value}" for value, methods in papers.items() if value != shown)


def _code(text: str) -> str:
    """Docstring markup as Markdown."""
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".md"):
        sys.exit("usage: python -m opdengine.tools.reference docs/settings.md")
    Path(sys.argv[1]).write_text(reference(), "utf-8")
