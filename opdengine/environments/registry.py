"""Environments by name."""

from __future__ import annotations

from opdengine.environments.protocol import Environment
from opdengine.plugins import load_object

ENVIRONMENTS = {
    "house": "opdengine.environments.house:House",
    "search": "opdengine.environments.search:Search",
    "recorded": "opdengine.environments.recorded:Recorded",
    "trl": "opdengine.environments.trl:TRLEnvironment",
    "alfworld": "opdengine.environments.alfworld:ALFWorld",
    "textworld": "opdengine.environments.textworld:TextWorld",
    "scienceworld": "opdengine.environments.scienceworld:ScienceWorld",
}
"""The built-in environments; each module is imported when it is asked for."""

POOL_OPTIONS = ("network",)
"""Options that are for :class:`opdengine.environments.pool.EnvironmentPool` and not for an environment's class."""

METHODS = ("tasks", "reset", "step", "close")


def load_environment(name: str) -> type[Environment]:
    """An environment's class by name, as ``package.module:Class`` or as ``path/to/file.py:Class``.

    Raises:
        ValueError: there is no such environment, or it lacks a method of the protocol.
        ImportError: a built-in one needs a package that is missing; names the pip command.
    """
    if ":" not in ENVIRONMENTS.get(name, name):
        raise ValueError(
            f"unknown environment {name!r}; use one of {sorted(ENVIRONMENTS)}, 'module:Class' or "
            "'path/to/file.py:Class'"
        )
    try:
        found = load_object(ENVIRONMENTS.get(name, name))
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        if name in ENVIRONMENTS:
            raise
        raise ValueError(f"environment {name!r} cannot be loaded: {error}") from error
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or missing:
        raise ValueError(
            f"environment {name!r} is not a class with the methods {', '.join(METHODS)}"
            + (f"; {', '.join(missing)} missing" if missing else "")
        )
    return found
