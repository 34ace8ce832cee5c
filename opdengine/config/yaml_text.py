"""YAML as settings need it: bounded in size, plain values only, and with what was written kept beside what it means.

Three readings of YAML 1.1 surprise people and are left out: dates, times and numbers in base 60 (``12:30``) and
octal numbers (``010``) are text here. Numbers such as ``1e-5`` are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from opdengine.errors import ConfigError
from opdengine.workers.printing import one_line

MAX_BYTES = 1 << 18
MAX_VALUES = 20_000
MAX_DEPTH = 40
MAX_DIGITS = 400
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = (None, "!", TAG + "str")
INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)$")
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)

BARE = object()
"""The value of an argument without one; it switches a truth value on."""


@dataclass(frozen=True)
class Written:
    """A value that is no text, together with how it was written: a setting that is text takes the latter."""

    value: Any
    text: str


class YAMLError(ConfigError):
    """Text that is no YAML."""


def read_yaml(text: str) -> Any:
    """The value of one YAML document; numbers and truth values are :class:`Written`, keys are text.

    Raises:
        YAMLError: the text is no YAML.
        ConfigError: it is too large or too deep (aliases count as what they stand for), has a key twice, or holds
            other than plain values.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{len(text)} characters of settings; {MAX_BYTES} are the most")
    try:
        _measure(text)
        return _copied(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise YAMLError(_problem(error)) from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise YAMLError(f"a value cannot be read ({one_line(str(error))})") from None


def dump_yaml(value: Any, **options: Any) -> str:
    """Plain values as YAML that :func:`read_yaml` and readers of YAML 1.1 understand alike."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)
    return text


def plain(value: Any) -> Any:
    """The value without :class:`Written`, at any depth."""
    return _copied(value, lambda leaf: leaf.value if isinstance(leaf, Written) else leaf)


def _copied(value: Any, leaf: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """A copy in which nothing is shared, as aliases would have it."""
    if isinstance(value, dict):
        return {key: _copied(item, leaf) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item, leaf) for item in value]
    return leaf(value)


class _Loader(yaml.SafeLoader):
    """Plain values; see :func:`read_yaml`."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping by the text of its keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                raise ConfigError(f"a key is empty, or no text, near line {line}")
            if key.tag == TAG + "merge":
                continue
            if key.value in seen:
                raise ConfigError(f"the setting {one_line(key.value, 80)!r} is given twice, near line {line}")
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _construct_written(loader: Any, node: Any) -> Any:
    if len(node.value) > MAX_DIGITS:
        raise ConfigError(f"a number of {len(node.value)} characters, near line {node.start_mark.line + 1}")
    kind = node.tag.removeprefix(TAG)
    value = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)
    return Written(value, node.value)


def _resolvers(loader: Any, left_out: tuple[str, ...]) -> dict[Any, list[tuple[str, re.Pattern[str]]]]:
    theirs = loader.yaml_implicit_resolvers.items()
    return {first: [(tag, regex) for tag, regex in found if tag not in left_out] for first, found in theirs}


class _Dumper(yaml.SafeDumper):
    """Quotes what either reader would take for something else than text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: Any, text: str) -> Any:
    escaped = re.search("[\x85\u2028\u2029\ufeff]", text)  # line ends of YAML, which plain text would not keep
    return dumper.represent_scalar(TAG + "str", text, style='"' if escaped else None)


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = _resolvers(yaml.SafeLoader, (TAG + "timestamp", TAG + "int", TAG + "float"))
_Loader.add_implicit_resolver(TAG + "int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))
for _kind in ("int", "float", "bool"):
    _Loader.add_constructor(TAG + _kind, _construct_written)
_Dumper.yaml_implicit_resolvers = _resolvers(yaml.SafeDumper, ())
_Dumper.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))


def _measure(text: str) -> None:
    """Refuse a document of too many values, too deep ones, other tags or recursion, before anything is built of it."""
    sizes: dict[str, tuple[int, int]] = {}  # anchor -> values and levels below it
    open_: list[list[Any]] = [["", 0, 0]]  # anchor, values so far, levels below
    for event in yaml.parse(text, _Loader):
        marked: Any = event
        line = marked.start_mark.line + 1
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag not in PLAIN_TAGS:
            raise ConfigError(f"the tag {one_line(event.tag, 80)!r} near line {line}; settings are plain values")
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append([event.anchor, 1, 0])
            if event.anchor:
                sizes.pop(event.anchor, None)
            added, levels = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, added, levels = open_.pop()
            levels += 1
            if anchor:
                sizes[anchor] = (added, levels)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _, _ in open_):
                raise ConfigError(f"the alias near line {line} stands for what it is part of")
            added, levels = sizes.get(marked.anchor, (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            added, levels = 1, 0
            if event.anchor:
                sizes[event.anchor] = (1, 0)
        else:
            continue
        open_[-1][1] += added
        open_[-1][2] = max(open_[-1][2], levels)
        if sum(size for _, size, _ in open_) > MAX_VALUES:
            raise ConfigError(f"more than {MAX_VALUES} values; aliases count as what they stand for")
        if len(open_) + open_[-1][2] > MAX_DEPTH:
            raise ConfigError(f"more than {MAX_DEPTH} levels of nesting, near line {line}")


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong and where; unlike PyYAML's message without the line itself, which may hold a secret."""
    if isinstance(error, yaml.reader.ReaderError):
        character = error.character if isinstance(error.character, int) else ord(error.character[:1] or "\0")
        return f"character {error.position + 1} is U+{character:04X}, which no text file has"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    what = one_line(str(getattr(error, "problem", None) or getattr(error, "context", None) or "no YAML"), 120)
    return where + what + ("; indent with spaces, not with tabs" if r"'\t'" in what else "")
