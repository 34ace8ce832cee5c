"""What the tables of the papers share: how a row is read, what is compared, and settings that are no paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opdengine.config.loading import from_mapping, load_config
from opdengine.config.train import TrainConfig

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

Row = tuple[str, Any, str]
"""A dotted setting (numbers count items of a list), the paper's value, and where the paper or its code has it."""

MACHINE: Sequence[Row] = (
    ("dtype", "float32", "ours: master weights"),
    ("bf16", True, "ours, and bf16 in the released scripts of 2605.01347"),
    ("gradient_checkpointing", True, "ours"),
    ("report_to", ["tensorboard"], "ours"),
)
VLLM: Sequence[Row] = (("use_vllm", True, "ours"),)
THINKS_NOT: Sequence[Row] = (("chat_template_kwargs", {"enable_thinking": False}, "students do not think"),)
FREE = ("train_data", "output_dir")
"""Files of the reader's own."""


def teacher(place: int, **settings: Any) -> list[Row]:
    """Rows of one teacher: what is given, in bfloat16."""
    found = {"dtype": "bfloat16", **settings}
    return [(f"teachers.{place}.{name}", value, "models of the paper") for name, value in found.items()]


def at(config: Any, setting: str) -> Any:
    """The value of a dotted setting."""
    for name in setting.split("."):
        if isinstance(config, Sequence):
            config = config[int(name)]
        elif isinstance(config, Mapping):
            config = config[name]
        else:
            config = getattr(config, name)
    return config


def differences(config: Any, rows: Iterable[Row]) -> list[str]:
    """Rows that the configuration does not hold, in words."""
    return [
        f"{setting} is {at(config, setting)!r}, in the paper {value!r} ({where})"
        for setting, value, where in rows
        if at(config, setting) != value or isinstance(at(config, setting), bool) is not isinstance(value, bool)
    ]


def preset(name: str) -> TrainConfig:
    """A preset as a run reads it."""
    return load_config(str(CONFIGS / f"{name}.yaml"))


def unlisted(name: str, rows: Iterable[Row]) -> list[str]:
    """What a preset sets and no row names."""
    listed = {setting for setting, _, _ in rows}
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return sorted(s for s in _leaves(written) if s.split(".")[0] not in FREE and not _named(s, listed))


def method_defaults(method: str) -> TrainConfig:
    """A run that says nothing but its method."""
    needed = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"]}
    return from_mapping(TrainConfig, {**needed, "method": method})


def numbers_of(section: Any) -> set[str]:
    """The settings of a section that hold a number, a switch or a word."""
    found = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {name for name, value in found.items() if isinstance(value, (bool, int, float, str))}


def _leaves(value: Any, where: str = "") -> Iterable[str]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield where
    for key, inner in items:
        yield from _leaves(inner, f"{where}.{key}" if where else str(key))


def _named(setting: str, listed: set[str]) -> bool:
    """Whether a row names the setting or something that holds it."""
    parts = setting.split(".")
    return any(".".join(parts[:count]) in listed for count in range(1, len(parts) + 1))
