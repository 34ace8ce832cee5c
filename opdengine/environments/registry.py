"""Environments by name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from opdengine.environments.protocol import Environment
from opdengine.plugins import PluginError, import_object, load_object
from opdengine.workers.printing import brief

ENVIRONMENTS = {
    "search": "opdengine.environments.search:Search",
    "recorded": "opdengine.environments.recorded:Recorded",
    "trl": "opdengine.environments.trl:TRLEnvironment",
    "alfworld": "opdengine.environments.alfworld:ALFWorld",
    "textworld": "opdengine.environments.textworld:TextWorld",
    "scienceworld": "opdengine.environments.scienceworld:ScienceWorld",
}
"""The built-in environments; each module is imported when it is asked for."""

MOVED = {"house": "examples/tiny/agents/house.py:House"}
"""Worlds that were built in once, with their names of today; they are files of the repository, beside the examples."""

POOL_OPTIONS = ("network",)
"""Options that are for :class:`opdengine.environments.pool.EnvironmentPool` and not for an environment's class."""

MOST = 1e12
"""The bound of any number in the options of a built-in environment."""

METHODS = ("tasks", "reset", "step", "close")


def load_environment(name: str) -> type[Environment]:
    """An environment's class by name, as ``package.module:Class`` or as ``path/to/file.py:Class``.

    Raises:
        ValueError: there is no such environment, or it lacks a method of the protocol.
        ImportError: a built-in one needs a package that is missing; names the pip command.
    """
    if name in MOVED:
        raise ValueError(
            f"environment {name!r} is not built in any more; write {MOVED[name]!r}, with the path to your copy of "
            "the repository"
        )
    if ":" not in ENVIRONMENTS.get(name, name):
        raise ValueError(
            f"unknown environment {name!r}; use one of {sorted(ENVIRONMENTS)}, 'module:Class' or "
            "'path/to/file.py:Class'"
        )
    try:
        found = import_object(ENVIRONMENTS[name]) if name in ENVIRONMENTS else load_object(name)
    except PluginError as error:
        raise ValueError(f"environment {name!r} cannot be loaded: {error}") from error
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or missing:
        raise ValueError(
            f"environment {name!r} is not a class with the methods {', '.join(METHODS)}"
            + (f"; {', '.join(missing)} missing" if missing else "")
        )
    return found


def check_options(name: str, environment: type[Environment], options: Mapping[str, Any]) -> None:
    """Compare options with those that the environment has.

    Args:
        name: of the environment.
        environment: its class. Built-in ones say their options by a dataclass, ``option_class``; of others the
            keywords of ``tasks`` are taken, and where it takes any, nothing is checked.
        options: as configured.

    Raises:
        ValueError: one is unknown, or of a built-in environment has the wrong type.
    """
    described = getattr(environment, "option_class", None)
    if described is not None:
        known = {f.name: f.default for f in dataclasses.fields(described)}
    else:
        parameters = inspect.signature(environment.tasks).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        known = {p.name: p.default for p in list(parameters)[1:]}
    for option, value in options.items():
        if option not in (*known, *POOL_OPTIONS):
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"environment.options.{option} is unknown; {hint}{name!r} has {sorted(known)}")
        if described is not None and type(value) in (int, float) and not abs(value) <= MOST:
            raise ValueError(f"environment.options.{option}={brief(value)} is not possible; give a smaller number")
        wanted = type(known.get(option))
        if described is not None and wanted in (bool, int, float, str) and not _is_a(value, wanted):
            raise ValueError(
                f"environment.options.{option}={brief(value)} has the wrong type; expected {wanted.__name__}"
            )


def _is_a(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)
