"""The settings as a reader needs them: name, default and meaning, from the docstrings of the configuration."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from opdengine.config.train import ConfigError, TrainConfig
from opdengine.environments.registry import load_environment

WIDTH = 100
COMMON = (
    "model", "teachers", "train_data", "output_dir", "method", "divergence", "debate", "environment", "dtype", "bf16",
    "lora", "max_prompt_length", "max_completion_length", "temperature", "num_generations", "use_vllm", "max_staleness",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch", "max_steps", "learning_rate",
    "gradient_checkpointing", "eval_data", "verifier", "eval_steps", "save_steps", "report_to", "seed",
    "resume_from_checkpoint",
)  # fmt: skip
"""What most runs set."""


def meanings(cls: type) -> dict[str, str]:
    """What the ``Args`` of a class's docstring, and of those it inherits from, say by name, as plain text.

    Names in one entry share a text.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _entries(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return found


def _entries(doc: str) -> dict[str, str]:
    _, _, block = doc.partition("Args:\n")
    block = re.split(r"\n\n(?=\S)", block)[0]
    found: dict[str, str] = {}
    if not block.strip():
        return found
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(block).strip()):
        names, _, text = " ".join(entry.split()).partition(": ")
        found |= dict.fromkeys(names.split(", "), _plain(text))
    return found


def common() -> str:
    """The most used settings with the first sentence about each and the default, for the help of commands."""
    texts, fields = meanings(TrainConfig), {f.name: f for f in dataclasses.fields(TrainConfig)}
    lines = []
    for name in COMMON:
        default = _default(fields[name])
        plain = isinstance(default, (str, int, float)) and default != ""
        shown = f" [{_value(default)}]" if plain else ""
        lines += _wrapped(texts[name].split(". ")[0].rstrip(".") + shown, f"  {name:<29} ", " " * 32)
    return "\n".join(lines)


def annotated(names: Sequence[str] = ()) -> str:
    """A YAML file that holds every setting with its default, and what it means in a comment above.

    What has no default is left empty; what makes a list or is off by default is shown in comments.

    Args:
        names: only these settings or sections; "environment.NAME" stands for the options of that environment.

    Raises:
        ConfigError: there is no such setting; names the closest one.
    """
    options = [name for name in names if name.startswith("environment.")]
    names = [name for name in names if name not in options]
    parts = [_options(name.removeprefix("environment.")) for name in options]
    if names or not parts:
        parts.insert(0, _settings(names))
    return "\n".join(parts)


def _options(name: str) -> str:
    described = getattr(load_environment(name), "option_class", None)
    if described is None:
        raise ConfigError(f"environment {name!r} is not one of ours: its options are the keywords of its class")
    lines = _lines(described, [f.name for f in dataclasses.fields(described)], set())
    body = [f"    {line}".rstrip() for line in lines]
    return "\n".join(["environment:", f"  name: {name}", "  options:", *body]) + "\n"


def _settings(names: Sequence[str]) -> str:
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name in names:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "'opdengine settings' lists all"
            raise ConfigError(f"there is no setting or section {name!r}; {hint}")
    return "\n".join(_lines(TrainConfig, names or list(fields), set())).strip() + "\n"


def _lines(cls: Any, names: Sequence[str], shown: set[type]) -> Iterator[str]:
    texts, hints = meanings(cls), typing.get_type_hints(cls)
    said = ""
    for field in dataclasses.fields(cls):
        if field.name not in names:
            continue
        inner, text = _section(hints[field.name]), texts[field.name]
        if text != said or inner is not None:
            yield from ["", *_wrapped(text, "# ", "# ")]
        said = text
        default = _default(field)
        if inner is None or inner in shown:
            required = default is dataclasses.MISSING
            yield f"{field.name}:  # needed" if required else f"{field.name}: {_value(default)}"
            continue
        shown.add(inner)
        body = [f"  {line}".rstrip() for line in _lines(inner, [f.name for f in dataclasses.fields(inner)], shown)]
        if dataclasses.is_dataclass(default):
            yield from [f"{field.name}:", *body]
        else:
            yield f"{field.name}: {_value(default)}"
            yield "# a list of these:" if isinstance(default, list) else f"# {field.name}:"
            yield from (f"#{line}" for line in body)


def _section(hint: Any) -> type | None:
    """The dataclass that a setting is, lists, or may be."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    return next((found for part in typing.get_args(hint) if (found := _section(part)) is not None), None)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _plain(text: str) -> str:
    """Without the markup of docstrings."""
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("``", "")
