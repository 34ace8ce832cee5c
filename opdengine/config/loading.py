"""Settings from YAML and the command line into dataclasses; unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.config.secrecy import names_secret
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.config.yaml_text import MAX_BYTES, Written, YAMLError, plain, read_yaml
from opdengine.plugins import load_object
from opdengine.workers.printing import brief, one_line

ELSEWHERE = {
    "beta": "divergence (0 is forward_kl, 1 reverse_kl, between them jsd with jsd_beta)",
    "dataset_name": "train_data (name:split, or a file)",
    "eval_strategy": "eval_steps (0: only before and after)",
    "fp16": "bf16, or neither",
    "lora_alpha": "lora.lora_alpha",
    "lora_r": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "max_length": "max_prompt_length and max_completion_length",
    "max_new_tokens": "max_completion_length",
    "model_name_or_path": "model",
    "num_train_epochs": "max_steps",
    "save_strategy": "save_steps (0: never)",
    "teacher_model": "teachers.0.model",
    "teacher_model_name_or_path": "teachers.0.model",
    "torch_dtype": "dtype",
    "use_peft": "lora.r",
    "warmup_steps": "warmup_ratio",
}
"""Names of transformers and TRL that mean something else here, or are called something else."""

BARE = object()
"""The value of an argument without one; it switches a truth value on."""

DASHES = tuple("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d")
MAX_PARTS = 30
LIKE_OCTAL = re.compile(r"[-+]?0[0-9_]+")
NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def load_config(path: str | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: YAML file, or None for overrides only.
        overrides: ``--key value``, ``--key=value``, ``--section.key value``,
            ``--teachers.0.model path``; a bare ``--flag`` sets a boolean.

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
    for key, value in pairs:
        _assign(data, key.split("."), value)
    return from_mapping(TrainConfig, data)


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


def from_mapping(cls: type, data: Mapping[str, Any], where: str = "") -> Any:
    """Build a dataclass from a mapping; unknown and missing keys are errors.

    What a run does not say is taken from its method's paper (:data:`opdengine.methods.PAPERS`) before the defaults.

    Raises:
        ConfigError: see above; an unknown key comes with the closest known one.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the settings'}={brief(data)} is no mapping")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if cls is TrainConfig:
        data = with_paper(data)
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown setting {one_line(where + str(key))!r}; {_hint(str(key), fields, where)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing setting {', '.join(repr(where + name) for name in missing)}")
    values = {key: _coerce(hints[key], value, where + key) for key, value in data.items()}
    return cls(**values)


def with_paper(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a run with the defaults of its method's paper; what is there stays."""
    method = data.get("method", TrainConfig.method)
    # A method's settings stand beside the method, which stands above this room: it is asked for by name.
    papers = load_object("opdengine.methods:PAPERS")
    return papers[method].fill(data) if isinstance(method, str) and method in papers else data


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a section's settings."""
    return typing.get_type_hints(cls)


def _hint(key: str, fields: Iterable[str], where: str) -> str:
    if not where and key in ELSEWHERE:
        return f"here it is {ELSEWHERE[key]}"
    if names_secret(key):
        return "keys are no settings: name the environment variable that holds it with api_key_env of a teacher"
    options = () if where else ("config",)
    if close := difflib.get_close_matches(key[:100], [*fields, *options], n=1):
        return f"did you mean {('--' if close[0] in options else where) + close[0]!r}?"
    return "'opdengine settings' lists all"


def to_mapping(config: Any) -> dict[str, Any]:
    """The configuration as plain YAML-able values."""
    return dataclasses.asdict(config)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if (value is None or value == "null") and type(None) in typing.get_args(hint):
            return None
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(options) == 1:
            return _coerce(options[0], value, where)  # its own message says more
        meant = value.value if isinstance(value, Written) else value
        for option in options:
            shape = typing.get_origin(option) or option
            if isinstance(meant, (Mapping, list)) and _takes(shape, meant):
                return _coerce(option, meant, where)
        for option in options:
            try:
                return _coerce(option, value, where)
            except ConfigError:
                continue
        raise _wrong_type(where, value, " or ".join(map(_called, options)))
    if hint is str:
        return _text(value, where)
    if isinstance(value, Written) and value.value is BARE and hint is not bool:
        raise ConfigError(f"--{where} needs a value: --{where} VALUE")
    if isinstance(value, Written) and isinstance(value.value, (Mapping, list)):
        value = value.value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise _wrong_type(where, value, "a mapping")
        return from_mapping(hint, value, where + ".")
    if origin is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        (inner,) = typing.get_args(hint)
        return [_coerce(inner, item, f"{where}.{i}") for i, item in enumerate(items)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(where, value, "a mapping")
        inner = typing.get_args(hint)[1]
        return {_text(str(k), where): _coerce(inner, v, f"{where}.{one_line(str(k), 80)}") for k, v in value.items()}
    if hint is Any:
        return _checked(plain(value), where)
    return _coerce_scalar(hint, value, where)


def _takes(shape: Any, value: Any) -> bool:
    """Whether a mapping or a list is what a part of a union stands for."""
    if isinstance(value, list):
        return shape is list
    return shape is dict or dataclasses.is_dataclass(shape)


def _text(value: Any, where: str) -> str:
    """A setting that is text, as it was written."""
    if isinstance(value, Written):
        if value.value is BARE:
            raise ConfigError(f"--{where} needs a value: --{where} VALUE")
        value = value.text
    if isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool):
        value = brief(value) if isinstance(value, int) else str(value)
    if not isinstance(value, str):
        raise _wrong_type(where, value, "text")
    return _checked(value, where)


def _checked(value: Any, where: str) -> Any:
    """The value; every text in it must be one that can be written to a file."""
    if isinstance(value, str) and (found := NO_TEXT.search(value)):
        raise ConfigError(
            f"{where} holds the character {found[0].encode('unicode_escape').decode()}, which no text has"
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            _checked(key, where), _checked(item, f"{where}.{one_line(str(key), 80)}")
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _checked(item, f"{where}.{number}")
    return value


def _coerce_scalar(hint: type, value: Any, where: str) -> Any:
    written, value = value, plain(value)
    if value is BARE:
        return True
    if isinstance(value, bool) and hint is not bool:
        raise _wrong_type(where, written, hint)
    if isinstance(value, hint):
        return value
    if hint is bool and isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if hint in (int, float) and isinstance(value, (int, float, str)):
        if isinstance(value, str) and LIKE_OCTAL.fullmatch(value.strip()):
            raise ConfigError(f"{where}={value} could be an octal number; write it without the 0 at its beginning")
        try:
            number = _number(value)
            if hint is float:
                return float(number)
            if int(number) == number:
                return int(number)
        except (ValueError, OverflowError):
            pass
    if isinstance(written, Written) and not written.text:
        raise ConfigError(f"--{where}= needs a value")
    raise _wrong_type(where, written, hint)


def _number(value: int | float | str) -> int | float:
    """A number from what YAML reads as a number or, in quotes, as text; whole ones keep all digits."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    return int(text) if re.fullmatch(r"[-+]?[0-9_]{1,400}", text) else float(text)


def _wrong_type(where: str, value: Any, wanted: Any) -> ConfigError:
    shown = one_line(value.text) if isinstance(value, Written) else brief(value)
    if names_secret(where.rpartition(".")[2]):
        shown = "..."
    return ConfigError(f"{where}={shown} has the wrong type; expected {_called(wanted)}")


def _called(hint: Any) -> str:
    """What a type is called in a message."""
    if isinstance(hint, str):
        return hint
    shape = typing.get_origin(hint) or hint
    names = {str: "text", int: "int", float: "float", bool: "bool", list: "a list", dict: "a mapping"}
    return names.get(shape, "a mapping")


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
    hint: Any = TrainConfig
    for i, part in enumerate(parts):
        section = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if section is not None:
            parts[i] = part.replace("-", "_")
            hint = _hints(typing.cast(type, section)).get(parts[i])
        elif typing.get_origin(hint) is list:
            (hint,) = typing.get_args(hint)
        else:
            break
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
