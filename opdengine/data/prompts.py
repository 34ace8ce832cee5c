"""Prompts from files, checked row by row, and a seeded stream that can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opdengine.config.sections import DataConfig
from opdengine.data.benchmarks import BENCH, find_benchmark
from opdengine.data.files import DataError, Undecodable, read_rows
from opdengine.data.formats import NotSelected, adapt, find_format, look_up
from opdengine.data.images import Pictures
from opdengine.data.reasoning_tasks import GENERATED
from opdengine.data.rows import ANSWERED, NO_PROMPT, parse_tools, prompt_of
from opdengine.models.given import is_given, label_of
from opdengine.types import Prompt

logger = logging.getLogger(__name__)

__all__ = [
    "DataError",
    "PromptSet",
    "PromptStream",
    "ScheduledStream",
    "Undecodable",
    "as_source",
    "drop_long",
    "load_prompts",
    "parse_tools",
    "read_rows",
]


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what was left out on the way.

    Args:
        prompts: the usable prompts, in file order.
        dropped: number of rows left out, by reason.
    """

    prompts: tuple[Prompt, ...]
    dropped: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        """Changes when any prompt changes."""
        digest = hashlib.sha256()
        for p in self.prompts:
            row = [p.id, p.messages, p.tools, p.key, p.answer, p.extra]
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @property
    def keys(self) -> tuple[str, ...]:
        """The routing keys that occur."""
        return tuple(sorted({p.key for p in self.prompts}))


def as_source(source: str | DataConfig) -> DataConfig:
    """A path alone stands for a source of our own layout."""
    config = DataConfig(source) if isinstance(source, str) else source
    if config.format == "prompts" and config.path.startswith(GENERATED):
        return replace(config, format="reasoning_gym")
    if config.format == "prompts" and config.path.startswith(BENCH):
        return replace(config, format=find_benchmark(config.path.removeprefix(BENCH)).format)
    return config


def load_prompts(sources: Sequence[str | DataConfig], *, skip_bad_rows: bool = False) -> PromptSet:
    """Read and check prompts.

    Args:
        sources: JSONL, JSON-list or Parquet files, ``datasets`` folders, hub data sets as
            ``name:split``, ``reasoning_gym:...``, ``bench:...``, or sections that say more than a path.
        skip_bad_rows: leave malformed rows out (counted) instead of refusing the file.

    Raises:
        ConfigError: a format is not known.
        DataError: a file is missing, a row is malformed, an id occurs twice, or nothing is left.
    """
    prompts: list[Prompt] = []
    bad: list[str] = []
    reasons: Counter[str] = Counter()
    seen: dict[str, str] = {}
    configs = [as_source(source) for source in sources]
    paths = [config.path for config in configs]
    for config in configs:
        find_format(config.format)
    for config, stem in zip(configs, _stems(paths), strict=True):
        pictures = Pictures(config)
        empty = dict(config.columns)
        columns: list[str] = []
        for number, row in read_rows(config.path):
            if isinstance(row, Mapping):
                columns = columns or sorted(map(str, row))
                empty = {name: at for name, at in empty.items() if look_up(row, at) is None}
            place = f"{config.path}, row {number}"
            try:
                prompt = prompt_of(adapt(row, config), f"{stem}:{number}", pictures)
                if prompt.id in seen:
                    raise ValueError(f"duplicate id {prompt.id!r} (first in {seen[prompt.id]})")
            except NotSelected as reason:
                reasons[f"not_selected/{reason}"] += 1
            except ValueError as error:
                bad.append(f"  {place}: {error}")
                reasons[_kind(str(error))] += 1
            else:
                seen[prompt.id] = place
                prompts.append(replace(prompt, place=place))
        if empty and columns:
            name, at = next(iter(empty.items()))
            raise DataError(
                f"{config.path}: no row has anything at {at!r}, which columns.{name} names; its columns are {columns}"
            )
    if bad and not skip_bad_rows:
        shown = "\n".join(bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        raise DataError(
            f"{len(bad)} of {len(bad) + len(prompts)} rows cannot be used:\n{shown}\n"
            f"{_remedy(bad)}Fix them, or leave them out with --skip_bad_rows."
        )
    if bad:
        logger.warning("left out %d bad rows: %s", len(bad), dict(reasons))
    if not prompts:
        left_out = f": all {len(bad)} rows are bad:\n" + "\n".join(bad[:10]) if bad else ""
        raise DataError(f"no prompts in {paths}{left_out or f' ({dict(reasons)})' if reasons else ''}")
    return PromptSet(tuple(prompts), dict(reasons))


REMEDIES = {
    NO_PROMPT: "Where the prompt has another name: train_data: [{path: FILE, columns: {prompt: ITS_NAME}}].",
    ANSWERED: "With format: sft that message is the given answer (column completion): [{path: FILE, format: sft}].",
}
"""What to do about rows of which the message begins so."""


def _remedy(bad: Sequence[str]) -> str:
    found = [remedy for kind, remedy in REMEDIES.items() if any(kind in line for line in bad)]
    return "".join(f"{remedy}\n" for remedy in found)


def _kind(message: str) -> str:
    """What counts as the same reason: the message without what belongs to one row."""
    known = next((kind for kind in REMEDIES if message.startswith(kind)), None)
    return known or message.split(" (")[0].split(" '")[0]


def drop_long(
    prompts: PromptSet,
    length_of: Callable[[Prompt], int],
    limit: int,
    reason: str = "max_prompt_length",
) -> PromptSet:
    """Leave out prompts of more than ``limit`` tokens, counted as "too_long".

    Args:
        prompts: to filter.
        length_of: tokens of a prompt.
        limit: most tokens.
        reason: where the limit comes from, for messages.

    Raises:
        DataError: a prompt cannot be rendered, or nothing is left.
    """
    kept: list[Prompt] = []
    too_long: list[Prompt] = []
    for p in prompts.prompts:
        try:
            length = length_of(p)
        except ValueError as error:
            raise DataError(f"prompt {p.id!r}: {error}") from error
        (kept if length <= limit else too_long).append(p)
    if too_long:
        logger.warning(
            "left out %d of %d prompts longer than %d tokens (%s), e.g. %s",
            len(too_long),
            len(prompts.prompts),
            limit,
            reason,
            ", ".join(repr(p.id) for p in too_long[:3]),
        )
    if not kept:
        raise DataError(
            f"no prompts left: all {len(too_long)} are longer than {limit} tokens ({reason}); raise "
            "the limit or check the data"
        )
    dropped = dict(prompts.dropped)
    if too_long:
        dropped["too_long"] = len(too_long)
    return PromptSet(tuple(kept), dropped)


class PromptStream:
    """An endless, seeded order of prompts: one permutation per epoch, resumable.

    Args:
        prompts: what to draw from.
        seed: of the order.
    """

    def __init__(self, prompts: PromptSet, seed: int) -> None:
        self.prompts = prompts.prompts
        self.seed = seed
        self.epoch = 0
        self.cursor = 0
        self._fingerprint = prompts.fingerprint
        self._order = self._permutation()

    def next(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; no prompt comes twice before all came once."""
        batch: list[Prompt] = []
        while len(batch) < count:
            if self.cursor == len(self.prompts):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation()
            batch.append(self.prompts[self._order[self.cursor]])
            self.cursor += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "seed": self.seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a run stopped.

        Raises:
            DataError: the data or the seed are not those of that run.
        """
        for name, current in (("fingerprint", self._fingerprint), ("seed", self.seed)):
            if state[name] != current:
                raise DataError(
                    f"the checkpoint was written with other training data ({name} {state[name]} "
                    f"then, {current} now); resume with the same data and seed, or start a new run"
                )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.prompts))


class Schedule(Protocol):
    """Which data stream a prompt belongs to, and what share of a step each stream has; a method has all three."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def stream_of(self, prompt: Prompt) -> str: ...

    def schedule(self, step: int) -> Mapping[str, float]: ...


class ScheduledStream:
    """Batches from several streams in the shares that a schedule asks for, each stream in its own order.

    Args:
        prompts: what to draw from.
        seed: of the orders.
        schedule: names the streams and their shares at each step.

    Raises:
        DataError: a stream has no prompt.
    """

    def __init__(self, prompts: PromptSet, seed: int, schedule: Schedule) -> None:
        parts: dict[str, list[Prompt]] = {name: [] for name in schedule.streams}
        for prompt in prompts.prompts:
            parts[schedule.stream_of(prompt)].append(prompt)
        if empty := [name for name, part in parts.items() if not part]:
            raise DataError(
                f"no prompt belongs to the stream {empty[0]!r} (data_source is one of {list(prompts.keys)}); add such "
                "prompts, or name other keys in the method's settings"
            )
        self.schedule = schedule
        self.step = 0
        self.streams = {name: PromptStream(PromptSet(tuple(part), {}), seed) for name, part in parts.items()}

    def next(self, count: int) -> list[Prompt]:
        """The ``count`` prompts of the next step, stream by stream; counts are rounded by largest remainder."""
        shares = self.schedule.schedule(self.step)
        wanted = {name: count * shares.get(name, 0.0) for name in self.streams}
        counts = {name: math.floor(x + 1e-9) for name, x in wanted.items()}
        by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
        for name in by_remainder[: count - sum(counts.values())]:
            counts[name] += 1
        self.step += 1
        return [prompt for name, stream in self.streams.items() for prompt in stream.next(counts[name])]

    def state_dict(self) -> dict[str, Any]:
        streams = {name: stream.state_dict() for name, stream in self.streams.items()}
        return {"step": self.step, "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a run stopped.

        Raises:
            DataError: the streams, their data or the seed are not those of that run.
        """
        if sorted(state.get("streams", ())) != sorted(self.streams):
            raise DataError(
                f"the checkpoint was written with the data streams {sorted(state.get('streams', ()))}, now there are "
                f"{sorted(self.streams)}; resume with the same method, or start a new run"
            )
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
        self.step = state["step"]


def _stems(paths: Sequence[str]) -> list[str]:
    """Return how the ids of rows without an id start: with the file's name, numbered where it is shared."""
    stems = [label_of(path) if is_given(path) else Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}#{i}" for i, stem in enumerate(stems)]
