"""Files of rows: JSON, JSON lines, Parquet, data sets; a row that cannot be read comes with the reason in its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opdengine.config.fields import at_home
from opdengine.data.benchmarks import BENCH, rows_of
from opdengine.data.reasoning_tasks import GENERATED, generate
from opdengine.models.given import find_given, is_given
from opdengine.models.hub import hub_problem
from opdengine.models.surrogates import levels, surrogate_in

MOST_LEVELS = 100
"""Rows are rendered, pickled and hashed by functions that call themselves once per level."""

MAGIC = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16 or UTF-32 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "the pointer of a Git LFS file and not the file; fetch it with 'git lfs pull'",
}
"""First bytes of files that are not what their names say, and the remedy."""


class DataError(ValueError):
    """A data file that cannot be used; the message names rows and the remedy."""


class Undecodable(str):
    """Stands in for a row that could not be read; says why."""


def parse_json(text: str) -> Any:
    """The value of a JSON text that can be used everywhere.

    Raises:
        ValueError: "not JSON (...)": malformed, a key twice in one object, more than :data:`MOST_LEVELS` levels, an
            integer of thousands of digits, or a lone surrogate, which no tokenizer and no file takes.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError:
        raise ValueError(f"not JSON that can be used (nested more than {MOST_LEVELS} levels deep)") from None
    except ValueError as error:  # a key twice, or an integer beyond Python's limit of digits
        raise ValueError(f"not JSON that can be used ({error})") from error
    if text.count("[") + text.count("{") > MOST_LEVELS or "\\u" in text:
        require_sound(value)
    return value


def require_sound(value: Any) -> None:
    """Raise ValueError where a value of JSON is nested too deeply or holds a lone surrogate."""
    for depth, level in enumerate(levels(value)):
        if depth > MOST_LEVELS:
            raise ValueError(f"not JSON that can be used (nested more than {MOST_LEVELS} levels deep)")
        for text in level:
            if isinstance(text, str) and (place := surrogate_in(text)) is not None:
                around = text[max(place - 20, 0) : place + 1]
                raise ValueError(f"not text (a lone surrogate, half of a character, behind {around!a})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!a} occurs twice in one object")
    return found


def without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column the same fields and fills those that a row lacks with null: they are left
    out again, at every level. Nulls in lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return type(value)(without_nulls(item) for item in value)
    return value


def read_rows(path: str) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a file; what cannot be decoded comes as :class:`Undecodable`.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    if is_given(path):
        yield from enumerate(map(_sound, find_given(path).rows or ()), start=1)
        return
    if path.startswith(GENERATED):
        yield from enumerate(_read(path, lambda: list(generate(path))), start=1)
        return
    if path.startswith(BENCH):
        yield from enumerate(_read(path, lambda: list(rows_of(path))), start=1)
        return
    file = Path(at_home(path))
    if file.is_file():
        _require_plain(path, file)
    if file.suffix in (".jsonl", ".ndjson") and file.is_file():
        yield from _jsonl(file)
    elif file.suffix == ".json" and file.is_file():
        yield from enumerate(map(_sound, _read(path, lambda: _json(file))), start=1)
    elif file.suffix == ".parquet" and file.is_file():
        yield from enumerate(_read(path, lambda: _parquet(file)), start=1)
    elif file.is_dir():
        import datasets

        yield from enumerate(_read(path, lambda: _arrow(datasets.load_from_disk(str(file)))), start=1)
    elif ":" in path and not file.suffix:
        yield from enumerate(_read(path, lambda: _hub(path)), start=1)
    else:
        raise DataError(
            f"data file {path!r} {'is of no kind that is read' if file.exists() else 'does not exist'}; name a file "
            "that ends in .jsonl, .json or .parquet, a folder written by datasets.save_to_disk, a hub data set as "
            "'name:split', generated tasks as 'reasoning_gym:NAMES', or 'bench:NAME'"
        )


def _read(path: str, load: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """The rows that ``load`` returns; whatever goes wrong names the file."""
    try:
        yield from load()
    except DataError as error:
        raise DataError(f"data file {path!r} {error}") from error
    except Exception as error:  # readers of files raise what they like
        detail = str(error) or type(error).__name__
        raise DataError(f"data file {path!r} cannot be read: {detail}") from error


def _hub(path: str) -> Iterable[Any]:
    """Rows of a data set of the hub, as ``name:split``."""
    import datasets

    name, _, split = path.rpartition(":")
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # huggingface_hub has classes of its own
        if problem := hub_problem(name, error, data=True):
            raise DataError(problem) from error
        raise
    return _arrow(data)


def _require_plain(path: str, file: Path) -> None:
    """Raise DataError for a file that is packed or encoded in another way than its name says."""
    with file.open("rb") as data:
        head = data.read(32)
    what = next((what for magic, what in MAGIC.items() if head.startswith(magic)), None)
    if what is None and len(head) > 1 and (head[0] == 0) != (head[1] == 0):
        what = MAGIC[b"\xfe\xff"]
    if what is not None:
        raise DataError(f"data file {path!r} is {what}")


def _json(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        hint = "; a file with one object on each line is called .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{error}{hint}") from error
    if isinstance(rows, Mapping):
        raise DataError(f"holds a mapping with {sorted(rows)[:5]}; one list of rows is needed")
    if not isinstance(rows, list):
        raise DataError(f"holds one value of type {type(rows).__name__}; one list of rows is needed")
    return rows


def _sound(row: Any) -> Any:
    try:
        require_sound(row)
    except ValueError as error:
        return Undecodable(str(error))
    return row


def _jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield number, Undecodable("not UTF-8")
            except ValueError as error:
                yield number, Undecodable(str(error))


def _parquet(file: Path) -> list[Any]:
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(file).read()
    names = table.schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"has several columns with the name {twice[0]!r}; rename them")
    try:
        return [without_nulls(row) for row in table.to_pylist()]
    except UnicodeDecodeError:  # of which row is not said
        return [_arrow_row(table, number) for number in range(table.num_rows)]


def _arrow_row(table: Any, number: int) -> Any:
    try:
        return without_nulls(table.slice(number, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return Undecodable("not UTF-8")


def _arrow(data: Any) -> Iterator[Any]:
    """Rows of a ``datasets.Dataset`` as Python values, whatever format it was saved with."""
    if isinstance(data, Mapping):
        splits = sorted(map(str, data))[:5]
        raise DataError(f"holds a mapping with {splits}; name one, as in FOLDER:{splits[0]}, or give a list of rows")
    if "Image(" in str(data.features):  # what decodes pictures here would do so before any bound
        chunks = data.with_format("arrow").iter(256)
        return (without_nulls(row) for chunk in chunks for row in chunk.to_pylist())
    return rows_in_memory(data)


def rows_in_memory(data: Any) -> Iterator[Any]:
    """Rows of a ``datasets.Dataset`` as Python values, with open pictures where it has some."""
    return (without_nulls(row) for row in data.with_format(None))
