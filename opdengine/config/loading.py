"""Settings from YAML and the command line into dataclasses; unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opdengine.config.train import ConfigError, TrainConfig
from opdengine.plugins import load_object

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


class _Strict(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if doubles := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"the setting {doubles[0]!r} is given twice, near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def load_config(path: str | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: YAML file, or None for overrides only.
        overrides: ``--key value``, ``--key=value``, ``--section.key value``,
            ``--teachers.0.model path``; a bare ``--flag`` sets a boolean.

    Raises:
        ConfigError: the file does not exist, a key is unknown or a value has the wrong type.
    """
    data: Any = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"configuration file {path!r} does not exist")
        try:
            data = yaml.load(file.read_text("utf-8"), _Strict) or {}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not a text file in UTF-8 ({error})") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: the top level must be a mapping of settings")
    pairs = _parse_overrides(overrides)
    if path is None and not pairs:
        raise ConfigError(
            "missing setting 'model', 'output_dir' and others: name a file of settings with --config run.yaml "
            "('opdengine settings' prints one with all of them), or give each as --key value"
        )
    for key, value in pairs:
        _assign(data, key.split("."), value)
    return from_mapping(TrainConfig, data)


def from_mapping(cls: type, data: Mapping[str, Any], where: str = "") -> Any:
    """Build a dataclass from a mapping; unknown and missing keys are errors.

    What a run does not say is taken from its method's paper (:data:`opdengine.methods.PAPERS`) before the defaults.

    Raises:
        ConfigError: see above; an unknown key comes with the closest known one.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if cls is TrainConfig:
        data = with_paper(data)
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown setting {where + str(key)!r}; {_hint(str(key), fields, where)}")
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


def _hint(key: str, fields: Iterable[str], where: str) -> str:
    if not where and key in ELSEWHERE:
        return f"here it is {ELSEWHERE[key]}"
    if close := difflib.get_close_matches(key, fields, n=1):
        return f"did you mean {where + close[0]!r}?"
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
        sections = [option for option in options if dataclasses.is_dataclass(option)]
        if isinstance(value, Mapping) and sections:
            return _coerce(sections[0], value, where)
        for option in options:
            try:
                return _coerce(option, value, where)
            except ConfigError:
                continue
        raise _wrong_type(where, value, hint)
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
        return {str(k): _coerce(inner, v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    return _coerce_scalar(hint, value, where)


def _coerce_scalar(hint: type, value: Any, where: str) -> Any:
    if isinstance(value, bool) and hint is not bool:
        raise _wrong_type(where, value, hint.__name__)
    if isinstance(value, hint):
        return value
    try:
        if hint is float and isinstance(value, (int, str)):
            return float(value)  # YAML reads 1e-5 as text
        if hint is int and isinstance(value, (float, str)) and float(value) == int(float(value)):
            return int(float(value))
        if hint is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if hint is str and isinstance(value, (int, float, datetime.date)):
            return str(value)
    except ValueError:
        pass
    raise _wrong_type(where, value, hint.__name__)


def _wrong_type(where: str, value: Any, wanted: Any) -> ConfigError:
    return ConfigError(f"{where}={value!r} has the wrong type; expected {wanted}")


def _parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    i = 0
    while i < len(arguments):
        name = arguments[i]
        if not name.startswith("--"):
            way = f"--config {name}" if name.endswith((".yaml", ".yml")) else "--key value"
            raise ConfigError(f"unexpected argument {name!r}; settings are given as {way}")
        key, equals, text = name[2:].partition("=")
        if not equals:
            follows = i + 1 < len(arguments) and not arguments[i + 1].startswith("--")
            text = arguments[i + 1] if follows else "true"
            i += follows
        pairs.append((key.replace("-", "_"), _override_value(text)))
        i += 1
    return pairs


def _override_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # a chat template, say: Jinja is not YAML


def _assign(data: Any, keys: Sequence[str], value: Any) -> None:
    """Set ``data[k0][k1]... = value``, growing mappings and lists on the way."""
    *path, last = keys
    for key, following in zip(path, keys[1:], strict=True):
        empty: Any = [] if following.isdigit() else {}
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
    if not key.isdigit() or int(key) > len(data):
        raise ConfigError(f"{key!r} is not a position in a list of {len(data)}")
    return int(key)
