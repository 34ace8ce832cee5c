"""A user's own code by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from opdengine.workers.printing import one_line

LIBRARIES = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")} - {None})


class PluginError(ValueError):
    """A user's own code cannot be loaded, or fails when it is called; the message names file, line and cause."""


def load_object(spec: str) -> Any:
    """What stands under ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        PluginError: there is nothing, or it cannot be loaded.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise PluginError(f"{spec!r} is neither 'module:name' nor 'path/to/file.py:name'")
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise PluginError(f"there is no Python file {place!r}")
    try:
        with without_sudden_end():
            module = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        told = explain(error)
        if place.endswith(".py") and place not in told:
            told = f"{place}: {told}"
        raise PluginError(f"{told}{_hint(error, place)}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        close = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        did_you_mean = f"; did you mean {close[0]!r}?" if close else ""
        raise PluginError(f"{place!r} has no {name!r}{did_you_mean}") from None


def import_object(spec: str) -> Any:
    """What stands under ``package.module:name`` in this package, whose errors say themselves what is missing."""
    place, _, name = spec.rpartition(":")
    return getattr(importlib.import_module(place), name)


@contextmanager
def without_sudden_end() -> Iterator[None]:
    """``os._exit`` raises SystemExit in this process, so that a user's code cannot end a run without a word.

    Its children keep it: they have nothing to tidy up that is not this process's.
    """
    sudden, owner = os._exit, os.getpid()

    def leave(status: int) -> None:
        if os.getpid() != owner:
            sudden(status)
        raise SystemExit(status)

    os._exit = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = sudden


def explain(error: BaseException) -> str:
    """What went wrong in a user's code: file and line, kind and message."""
    kind, text = type(error).__name__, one_line(str(error), 500)
    said = "it calls exit()" if isinstance(error, SystemExit) else f"{kind}: {text}" if text else kind
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}, line {error.lineno}: {kind}: {one_line(error.msg)}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    frames = [f for f in frames if f.filename != __file__]
    theirs = [f for f in frames if not f.filename.startswith(LIBRARIES)]
    return f"{theirs[-1].filename}, line {theirs[-1].lineno}: {said}" if theirs else said


def _load_file(path: str) -> ModuleType:
    file = Path(path).expanduser()
    name = f"opdengine_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _hint(error: BaseException, place: str) -> str:
    """What to do about a module that is not found."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    folder = Path(place).expanduser().resolve().parent
    top = error.name.split(".")[0]
    if place.endswith(".py") and any((folder / name).exists() for name in (f"{top}.py", top)):
        return f"; it lies beside that file: set PYTHONPATH={folder}"
    if not place.endswith(".py") and place.split(".")[0] == top:
        return "; install it, set PYTHONPATH to the folder that holds it, or write path/to/file.py:name"
    return ""
