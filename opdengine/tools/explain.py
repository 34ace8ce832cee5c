"""The settings as a reader needs them: name, default and meaning."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from opdengine.config.section import Section, fields_of
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.config.yaml_text import dump_yaml
from opdengine.environments.registry import load_environment
from opdengine.methods import PAPERS

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
    """The help of a section's settings by name, as plain text.

    Options of environments are those of their classes: what the ``Args`` of its docstring, and of those that it
    inherits from, say.
    """
    if issubclass(cls, Section):
        return {name: _plain(" ".join((info.description or "").split())) for name, info in fields_of(cls).items()}
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
        default = default_of(fields[name])
        plain = isinstance(default, (str, int, float)) and default != "" and not by_method(name)
        shown = f" [{in_yaml(default)}]" if plain else ""
        lines += _wrapped(texts[name].split(". ")[0].rstrip(".") + shown, f"  {name:<29} ", " " * 32)
    return "\n".join(lines)


def annotated(names: Sequence[str] = ()) -> str:
    """A YAML file that holds every setting with its default, and what it means in a comment above.

    What has no default is left empty; what makes a list, is off by default or has a default of its own in some
    method's paper is shown in comments.

    Args:
        names: only these settings or sections; "environment.NAME" stands for the options of that environment,
            "method.NAME" for what that method's paper sets.

    Raises:
        ConfigError: there is no such setting; names the closest one.
    """
    special = {"environment": _options, "method": _paper}
    parts, plain = [], []
    for name in names:
        kind, dot, rest = name.partition(".")
        if dot and kind in special:
            parts.append(special[kind](rest))
        else:
            plain.append(name)
    if plain or not parts:
        parts.insert(0, _settings(plain))
    return "\n".join(parts)


def _options(name: str) -> str:
    described = getattr(load_environment(name), "option_class", None)
    if described is None:
        raise ConfigError(f"environment {name!r} is not one of ours: its options are the keywords of its class")
    lines = _lines(described, [f.name for f in dataclasses.fields(described)], set(), "environment.options.")
    body = [f"    {line}".rstrip() for line in lines]
    return "\n".join(["environment:", f"  name: {name}", "  options:", *body]) + "\n"


def _paper(method: str) -> str:
    if method not in PAPERS:
        raise ConfigError(f"method {method!r} has no paper's settings; those that have are {sorted(PAPERS)}")
    paper, lines, open_ = PAPERS[method], [f"method: {method}  # arXiv {PAPERS[method].arxiv}"], ""
    for setting, (value, where) in sorted(paper.defaults.items(), key=lambda entry: entry[0].rpartition(".")[0]):
        section, _, name = setting.rpartition(".")
        lines += [f"{section}:"] if section != open_ else []
        lines.append(f"{'  ' if section else ''}{name}: {in_yaml(value)}  # {where}")
        open_ = section
    lines += ["# to be chosen; the paper's runs had"] if paper.choices else []
    lines += [f"# {setting}: {text}" for setting, text in paper.choices.items()]
    return "\n".join(lines) + "\n"


def by_method(setting: str) -> dict[str, list[str]]:
    """The defaults that papers give a setting, as written, with the methods that have each."""
    found: dict[str, list[str]] = {}
    for method, paper in PAPERS.items():
        if setting in paper.defaults:
            found.setdefault(in_yaml(paper[setting]), []).append(method)
    return found


def _settings(names: Sequence[str]) -> str:
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name in names:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "'opdengine settings' lists all"
            raise ConfigError(f"there is no setting or section {name!r}; {hint}")
    return "\n".join(_lines(TrainConfig, names or list(fields), set(), "")).strip() + "\n"


def _lines(cls: Any, names: Sequence[str], shown: set[type], where: str) -> Iterator[str]:
    texts, hints = meanings(cls), typing.get_type_hints(cls)
    said = ""
    for field in dataclasses.fields(cls):
        if field.name not in names:
            continue
        inner, text = _section(hints[field.name]), texts[field.name]
        if text != said or inner is not None:
            yield from ["", *_wrapped(text, "# ", "# ")]
        said = text
        default = default_of(field)
        if inner is None or inner in shown:
            required = default is dataclasses.MISSING
            of_papers = by_method(where + field.name)
            line = f"{field.name}:  # needed" if required else f"{field.name}: {in_yaml(default)}"
            yield f"#{line}" if of_papers else line
            yield from (f"#   {', '.join(methods)}: {value}" for value, methods in of_papers.items())
            continue
        shown.add(inner)
        deeper = _lines(inner, [f.name for f in dataclasses.fields(inner)], shown, f"{where}{field.name}.")
        body = [f"  {line}".rstrip() for line in deeper]
        if dataclasses.is_dataclass(default):
            yield from [f"{field.name}:", *body]
        else:
            yield f"{field.name}: {in_yaml(default)}"
            yield "# a list of these:" if isinstance(default, list) else f"# {field.name}:"
            yield from (f"#{line}" for line in body)


def _section(hint: Any) -> type | None:
    """The dataclass that a setting is, lists, or may be."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint)
    return next((found for part in typing.get_args(hint) if (found := _section(part)) is not None), None)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass's field, or ``dataclasses.MISSING``."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def in_yaml(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # YAML's quoted text
    return dump_yaml(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _plain(text: str) -> str:
    """Without the markup of docstrings."""
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("``", "")
