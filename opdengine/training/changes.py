"""What a resumed run has otherwise than before: refused, or named; and where its model folders lie now."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdengine.config.loading import to_mapping
from opdengine.config.section import BY_CONTENT, CHANGEABLE, EXTENDABLE, RESUMABLE, fields_of, mark_of, section_in
from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.models.files import some
from opdengine.models.fingerprint import contents, differences
from opdengine.teachers.about import ask_about, pool_of
from opdengine.training.event_loop import run_coroutine

logger = logging.getLogger(__name__)

CHANGES = "changes.jsonl"
SCHEDULE = ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio")
"""What the learning rate of a step depends on."""

Contents = Mapping[str, Mapping[str, str]]
"""Setting that names a model -> file -> hash."""


@dataclass(frozen=True)
class Change:
    """A setting that a resumed run has otherwise.

    Args:
        place: dotted name.
        before, now: its values.
        mark: what a resumed run may do with it (:data:`opdengine.config.section.MARKS`); None: nothing.
    """

    place: str
    before: Any
    now: Any
    mark: str | None

    def __str__(self) -> str:
        return f"{self.place}: {self.before!r} then, {self.now!r} now"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """How the settings of two runs differ, without those that a resumed run may have as it likes."""
    return list(_changes(before, now, TrainConfig, "", None))


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], cls: Any, place: str, outer: str | None
) -> Iterator[Change]:
    for name, info in fields_of(cls).items():
        mark, one, other = mark_of(info) or outer, before.get(name), now.get(name)
        if mark == RESUMABLE:
            continue
        inner = section_in(cls, name)
        pairs: list[tuple[str, Any, Any]] = []
        if inner is not None and isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            pairs = [
                (f".{i}", _as_section(inner, a), _as_section(inner, b))
                for i, (a, b) in enumerate(zip(one, other, strict=True))
            ]
        elif inner is not None:
            pairs = [("", one, other)]
        if pairs and all(isinstance(x, Mapping) for _, *both in pairs for x in both):
            for index, a, b in pairs:
                yield from _changes(a, b, inner, f"{place}{name}{index}.", mark)
        elif one != other:
            yield Change(place + name, one, other, mark)


def _as_section(cls: Any, value: Any) -> Any:
    """A source of data that is written as a path alone, in full."""
    return to_mapping(cls(value)) if isinstance(value, str) else value


def accept(found: Sequence[Change], config: TrainConfig, known: Container[str]) -> None:
    """Refuse changes that the run may not have.

    What may lie at another place is left to those who look at it: data to the stream of prompts, models to
    :func:`require_same_models`.

    Args:
        found: see :func:`changes`.
        config: of the run now.
        known: the settings of models of which the checkpoint says what lay there.

    Raises:
        ConfigError: names each with both values, and what can be done.
    """

    def may(change: Change) -> bool:
        moved = change.mark == BY_CONTENT and (change.place.startswith("train_data.") or change.place in known)
        return moved or change.mark == EXTENDABLE or (change.mark == CHANGEABLE and config.allow_changes)

    refused = [change for change in found if not may(change)]
    if not refused:
        return
    listing = "\n".join(f"  {change}" for change in refused)
    remedy = "Resume with the same settings, go on with these by --allow_changes, or start a new run"
    if fixed := [change.place for change in refused if change.mark != CHANGEABLE]:
        remedy = (
            f"What is trained and in which order depends on {', '.join(fixed)}, which cannot be changed: resume with "
            "the same settings, or start a new run"
        )
    raise ConfigError(f"the run to resume had other settings:\n{listing}\n{remedy} in another output_dir.")


def models_of(config: TrainConfig) -> dict[str, str]:
    """The settings that name models which are loaded here, or judge exactly elsewhere -> place."""
    known = [(i, t.model) for i, t in enumerate(config.teachers) if t.judges_exactly and t.model != SELF]
    return {"model": config.model, **{f"teachers.{i}.model": path for i, path in known}}


def contents_of_models(config: TrainConfig) -> dict[str, dict[str, str]]:
    """What the models of a run are, by setting; servers of hidden states are asked.

    Raises:
        ProbeError: of such servers none answers, or one serves another model.
    """
    seen: dict[str, dict[str, str] | None] = {}
    found: dict[str, dict[str, str]] = {}
    elsewhere = {f"teachers.{i}.model": t for i, t in enumerate(config.teachers) if t.hidden_states_url}
    for place, path in models_of(config).items():
        if place in elsewhere:
            found[place] = dict(run_coroutine(ask_about(pool_of(elsewhere[place]), elsewhere[place])).contents)
            continue
        if path not in seen:
            seen[path] = contents(path, config.trust_remote_code)
        if (files := seen[path]) is not None:
            found[place] = files
    return found


def require_same_models(config: TrainConfig, before: Contents, now: Contents) -> None:
    """Raise ConfigError where a model folder holds another model than when the checkpoint was written."""
    for place, path in models_of(config).items():
        if place not in before or place not in now:
            continue
        if changed := differences(before[place], now[place]):
            raise ConfigError(
                f"{place}={path!r} is another model than the run to resume had (what differs: {some(changed)}): put "
                "that model back, or start a new run in another output_dir"
            )


def speak_of_schedule(found: Sequence[Change], config: TrainConfig, step: int) -> bool:
    """Say what becomes of the learning rate; return whether its schedule begins anew at this step."""
    concerned = [change for change in found if change.place in SCHEDULE]
    if not concerned:
        return False
    listing = ", ".join(f"{change.place} {change.before} -> {change.now}" for change in concerned)
    left = config.max_steps - step
    if config.changed_schedule == "restart" and left:
        what = f"begins anew after step {step}, warm-up included, over the {left} steps that are left"
    else:
        what = "is continued, as if it had been so from the first step on (changed_schedule: restart begins it anew)"
    logger.warning("%s: the schedule %r of the learning rate %s", listing, config.lr_scheduler_type, what)
    return bool(config.changed_schedule == "restart" and left)


def note_changes(folder: Path, step: int, found: Sequence[Change], *, keep: bool) -> None:
    """Write down what is otherwise from a step on; lines of later steps, which are done again, are left out.

    Args:
        folder: of the run.
        step: the last one that was done with the settings before.
        found: may be empty.
        keep: whether, without changes, the line of this step stays: where no checkpoint says what the settings were,
            those of a run that was killed before its next checkpoint have become the ones to compare with.
    """
    file = folder / CHANGES
    last = step if keep and not found else step - 1
    lines = [line for line in read_changes(folder) if line["step"] <= last]
    if found:
        lines.append({"step": step, "changes": {change.place: [change.before, change.now] for change in found}})
    if lines or file.exists():
        partial = file.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        partial.replace(file)


def read_changes(folder: Path) -> list[dict[str, Any]]:
    """The lines of :func:`note_changes`: ``step``, and ``changes`` with setting -> [before, after]."""
    file = folder / CHANGES
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
