"""Models, tokenizers and rows that ``train`` was given in Python as objects, under the names that stand for them.

A setting that names a model or a data source holds the name in place of a path, and whoever reads the path finds the
object here. The name says what the object is, so that the settings of a run tell what cannot be read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opdengine.errors import ConfigError

PREFIX = "in memory: "


@dataclass(frozen=True)
class Given:
    """An object in place of a path.

    Args:
        model: a transformers model, or None.
        tokenizer: of the model.
        rows: of a data source, or None.
    """

    model: Any = None
    tokenizer: Any = None
    rows: Sequence[Any] | None = None


_objects: dict[str, Given] = {}


@contextmanager
def given(objects: Mapping[str, Given]) -> Iterator[None]:
    """Return a context in which the names stand for these objects."""
    before = dict(_objects)
    _objects.update(objects)
    try:
        yield
    finally:
        _objects.clear()
        _objects.update(before)


def is_given(path: str) -> bool:
    """Whether a path is the name of an object."""
    return path.startswith(PREFIX)


def find_given(path: str) -> Given:
    """The object under a name.

    Raises:
        ConfigError: it is not here, but was given to another call.
    """
    if path not in _objects:
        raise ConfigError(
            f"{path!r} stands for an object that train() was given in Python, and it is not here: call train() with "
            "it again, or name a folder or file in its place"
        )
    return _objects[path]


def label_of(path: str) -> str:
    """The first word of a name, for ids of rows."""
    return path.removeprefix(PREFIX).partition(" ")[0]
