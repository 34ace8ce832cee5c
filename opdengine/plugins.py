"""A user's own code by name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_object(spec: str) -> Any:
    """What stands under ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        ImportError, AttributeError, OSError, SyntaxError: there is nothing, or it cannot be loaded.
    """
    place, _, name = spec.rpartition(":")
    if not place:
        raise ImportError(f"{spec!r} is neither 'module:name' nor 'path/to/file.py:name'")
    return getattr(_load_file(place) if place.endswith(".py") else importlib.import_module(place), name)


def _load_file(path: str) -> ModuleType:
    name = f"opdengine_user_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise OSError(f"there is no Python file {path!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
