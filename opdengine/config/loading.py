"""Settings from YAML and the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from opdengine.config.section import read, section_in
from opdengine.config.train import TrainConfig
from opdengine.config.yaml_text import BARE, MAX_BYTES, Written, YAMLError, plain, read_yaml
from opdengine.errors import ConfigError
from opdengine.plugins import load_object
from opdengine.workers.printing import brief, one_line

T = TypeVar("T")

DASHES = tuple("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d")
MAX_PARTS = 30
LENGTHS = ("max_steps", "num_train_epochs")


def load_config(
    path: str | None, overrides: Sequence[str] = (), unused: Mapping[str, Any] = MappingProxyType({})
) -> TrainConfig:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: YAML file, or None for overrides only.
        overrides: ``--key value``, ``--key=value``, ``--section.key value``,
            ``--teachers.0.model path``; a bare ``--flag`` sets a boolean.
        unused: values of settings that a run needs and the command does not, where they are left out.

    Raises:
        ConfigError: the file does not exist, a key is unknown or a value has the wrong type.
    """
    data = {} if path is None else read_settings(path)
    pairs = _parse_overrides(overrides)
    if not data and not pairs:
        empty = "" if path is None else f"{path} is empty; "
        raise ConfigError(
            f"{empty}missing setting 'model', 'output_dir' and others: name a file of settings with --config run.yaml "
            "('opdengine settings' prints one with all of them), or give each as --key value"
        )
    given = {key for key, _ in pairs}
    for key, other in (LENGTHS, LENGTHS[::-1]):
        if key in given and other not in given:  # each says how long a run is
            data.pop(other, None)
    for key, value in pairs:
        _assign(data, key.split("."), value)
    return from_mapping(TrainConfig, {**unused, **data})


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: there is no such file, or it is no mapping of plain values of a reasonable size.
    """
    file = Path(path)
    try:
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "is no regular file" if file.exists() else "does not exist"
            raise ConfigError(f"configuration file {str(path)!r} {what}")
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, which no settings need")
        data = read_yaml(content.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error})") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise ConfigError(f"{path} holds {kind}; the top level must be a mapping of settings, such as 'model: PATH'")
    return data


def from_mapping(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build a section from a mapping.

    What a run does not say is taken from its method's paper (:data:`opdengine.methods.PAPERS`) before the defaults.

    Raises:
        ConfigError: a value is not possible, or a key is missing or unknown; the latter comes with the closest known.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"the settings={brief(data)} is no mapping")
    if cls is TrainConfig and all(data.get(name) is not None for name in LENGTHS):
        raise ConfigError(f"{' and '.join(LENGTHS)} both say how long the run is; give one of them")
    return read(cls, dict(with_paper(data) if cls is TrainConfig else data))


def with_paper(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a run with the defaults of its method's paper; what is there stays."""
    method = data.get("method", TrainConfig.method)
    # A method's settings stand beside the method, which stands above this room: it is asked for by name.
    papers = load_object("opdengine.methods:PAPERS")
    found: Mapping[str, Any] = papers[method].fill(data) if isinstance(method, str) and method in papers else data
    return found


def to_mapping(config: Any) -> dict[str, Any]:
    """The configuration as plain YAML-able values."""
    return dataclasses.asdict(config)


def _parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """``--key value`` pairs; whoever comes after ``--key`` without ``--`` is its value."""
    pairs: list[tuple[str, Any]] = []
    i = 0
    while i < len(arguments):
        name = arguments[i]
        if name[:1] in DASHES:
            raise ConfigError(
                f"{one_line(name)!r} begins with a dash that is none of the keyboard's; write -- in its place"
            )
        if not name.startswith("--"):
            way = f"--config {name}" if name.endswith((".yaml", ".yml")) else "--key value"
            raise ConfigError(f"unexpected argument {one_line(name)!r}; settings are given as {way}")
        key, equals, text = name[2:].partition("=")
        value: Any = Written(BARE, "") if not equals else _override_value(text)
        if not equals and i + 1 < len(arguments) and not arguments[i + 1].startswith("--"):
            value = _override_value(arguments[i + 1])
            i += 1
        key = _normal(key)
        for earlier, _ in pairs:
            if f"{earlier}.".startswith(f"{key}."):
                again = "is given twice" if earlier == key else f"would undo --{earlier} before it"
                raise ConfigError(f"--{key} {again}; give it once (a list as --{key} '[A, B]')")
        pairs.append((key, value))
        i += 1
    return pairs


def _normal(key: str) -> str:
    """A dotted key with ``-`` as ``_`` in the names of settings; the user's own names are left as they are."""
    parts = key.split(".")
    if not all(parts) or len(parts) > MAX_PARTS:
        raise ConfigError(f"--{one_line(key, 80)} names no setting; write --key value or --section.key value")
    section: Any = TrainConfig
    for i, part in enumerate(parts):
        if section is None:
            break
        if not part.isdecimal():  # a position in a list
            parts[i] = part.replace("-", "_")
            section = section_in(section, parts[i])
    return ".".join(parts)


def _override_value(text: str) -> Any:
    """The value of an argument: what YAML makes of it, with the text itself for settings that are text."""
    try:
        value = read_yaml(text)
    except YAMLError:
        return text  # a chat template, say: Jinja is not YAML
    if value is None:
        return None if text.strip() in ("null", "~", "Null", "NULL") else Written(None, text)
    if isinstance(value, str):
        return value if text.lstrip()[:1] in ("'", '"') else text  # what looks like a comment to YAML is text here
    return Written(plain(value), text)


def _assign(data: Any, keys: Sequence[str], value: Any) -> None:
    """Set ``data[k0][k1]... = value``, growing mappings and lists on the way."""
    *path, last = keys
    for key, following in zip(path, keys[1:], strict=True):
        empty: Any = [] if re.fullmatch("[0-9]+", following) else {}
        if isinstance(data, list):
            index = _index(data, key)
            if index == len(data):
                data.append(empty)
            data = data[index]
        elif not isinstance(data, dict):
            raise ConfigError(f"--{'.'.join(keys)}: {key!r} is below a plain value, not a section")
        else:
            if data.get(key) is None:
                data[key] = empty
            data = data[key]
    if isinstance(data, list):
        index = _index(data, last)
        data[index : index + 1] = [value]
    elif isinstance(data, dict):
        data[last] = value
    else:
        raise ConfigError(f"--{'.'.join(keys)}: {path[-1]!r} is not a section")


def _index(data: list[Any], key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", key) or int(key) > len(data):
        raise ConfigError(f"{one_line(key, 80)!r} is not a position in a list of {len(data)}")
    return int(key)
