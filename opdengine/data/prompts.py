"""Prompts from files, checked row by row, and a seeded stream that can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opdengine.config.sections import DATA_COLUMNS, DataConfig
from opdengine.data.formats import NotSelected, adapt, find_format
from opdengine.data.reasoning_tasks import GENERATED, generate
from opdengine.models.chat import plain_message
from opdengine.types import Prompt

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """A data file that cannot be used; the message names rows and the remedy."""


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
    generated = config.path.startswith(GENERATED) and config.format == "prompts"
    return replace(config, format="reasoning_gym") if generated else config


def load_prompts(sources: Sequence[str | DataConfig], *, skip_bad_rows: bool = False) -> PromptSet:
    """Read and check prompts.

    Args:
        sources: JSONL, JSON-list or Parquet files, ``datasets`` folders, hub data sets as
            ``name:split``, ``reasoning_gym:...``, or sections that say more than a path.
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
        for number, row in read_rows(config.path):
            place = f"{config.path}, row {number}"
            try:
                problem, prompt = _check(adapt(row, config), f"{stem}:{number}")
            except NotSelected as reason:
                reasons[f"not_selected/{reason}"] += 1
                continue
            except ValueError as error:
                problem, prompt = str(error), None
            if prompt is not None and prompt.id in seen:
                problem = f"duplicate id {prompt.id!r} (first in {seen[prompt.id]})"
                prompt = None
            if prompt is None:
                bad.append(f"  {place}: {problem}")
                reasons[str(problem).split(" (")[0].split(" '")[0]] += 1
            else:
                seen[prompt.id] = place
                prompts.append(prompt)
    if bad and not skip_bad_rows:
        shown = "\n".join(bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        raise DataError(
            f"{len(bad)} of {len(bad) + len(prompts)} rows cannot be used:\n{shown}\n"
            "Fix them, or leave them out with --skip-bad-rows."
        )
    if bad:
        logger.warning("left out %d bad rows: %s", len(bad), dict(reasons))
    if not prompts:
        left_out = f": all {len(bad)} rows are bad:\n" + "\n".join(bad[:10]) if bad else ""
        raise DataError(f"no prompts in {paths}{left_out or f' ({dict(reasons)})' if reasons else ''}")
    return PromptSet(tuple(prompts), dict(reasons))


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


class Undecodable(str):
    """Stands in for a row that could not be read; says why."""


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


def _check(row: Any, default_id: str) -> tuple[str | None, Prompt | None]:
    """A prompt, or what is wrong with the row."""
    if isinstance(row, Undecodable):
        return str(row), None
    if not isinstance(row, Mapping):
        return "not a JSON object", None
    column = "messages" if row.get("messages") is not None else "prompt"
    content = row.get(column)
    if content is None:
        return f"neither 'prompt' nor 'messages' (columns: {sorted(map(str, row))})", None
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if not isinstance(content, (list, tuple)) or not content:
        return f"{column!r} is neither text nor a non-empty list of messages", None
    for message in content:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "a message without 'role'", None
    try:
        messages = tuple(plain_message(_without_none(message)) for message in content)
        tools = parse_tools(row.get("tools"))
    except ValueError as error:
        return str(error), None
    last = messages[-1]
    if last["role"] == "assistant":
        return "the last message is the assistant's; the student is to write that one", None
    if last["role"] == "user" and not last.get("content", "").strip():
        return "empty prompt", None
    return None, Prompt(
        id=str(row.get("id") if row.get("id") is not None else default_id),
        messages=messages,
        tools=tools,
        key=str(row.get("data_source") or ""),
        answer=row.get("answer"),
        extra={k: v for k, v in row.items() if k not in DATA_COLUMNS},
    )


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """Parquet fills absent fields of a struct with None; templates must not see them."""
    return {k: v for k, v in message.items() if v is not None}


def parse_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas from a list, its JSON text, or nothing.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is not JSON ({error.msg} at column {error.colno})") from error
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' is not a list of JSON schemas")
    return tuple(tools)


def _stems(paths: Sequence[str]) -> list[str]:
    """What the ids of rows without an id start with: the file's name, numbered where it is shared."""
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}#{i}" for i, stem in enumerate(stems)]


def read_rows(path: str) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a file; what cannot be decoded comes as :class:`Undecodable`.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    if path.startswith(GENERATED):
        yield from enumerate(_read(path, lambda: list(generate(path))), start=1)
        return
    file = Path(path).expanduser()
    if file.suffix in (".jsonl", ".ndjson") and file.is_file():
        yield from _jsonl(file)
    elif file.suffix == ".json" and file.is_file():
        yield from enumerate(_read(path, lambda: json.loads(file.read_text("utf-8-sig"))), start=1)
    elif file.suffix == ".parquet" and file.is_file():
        import pyarrow.parquet as parquet

        yield from enumerate(_read(path, lambda: parquet.read_table(file).to_pylist()), start=1)
    elif file.is_dir():
        import datasets

        yield from enumerate(_read(path, lambda: datasets.load_from_disk(str(file))), start=1)
    elif ":" in path and not file.suffix:
        import datasets

        name, _, split = path.rpartition(":")
        yield from enumerate(_read(path, lambda: datasets.load_dataset(name, split=split)), start=1)
    else:
        raise DataError(
            f"data file {path!r} does not exist or is none of .jsonl, .json, .parquet, a folder written by "
            "datasets.save_to_disk, a hub data set as 'name:split', or generated tasks as 'reasoning_gym:NAMES'"
        )


def _read(path: str, load: Callable[[], Any]) -> Any:
    """The rows that ``load`` returns; whatever goes wrong names the file."""
    try:
        rows = load()
    except (ValueError, OSError) as error:
        raise DataError(f"data file {path!r} cannot be read: {error}") from error
    if isinstance(rows, Mapping):
        names = sorted(map(str, rows))[:5]
        raise DataError(f"data file {path!r} holds a mapping with {names}; one list of rows is needed")
    return rows


def _jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield number, Undecodable("not UTF-8")
            except json.JSONDecodeError as error:
                yield number, Undecodable(f"not JSON ({error.msg} at column {error.colno})")
