"""opdengine: on-policy distillation of language models from one or more teachers.

``train``, ``TrainConfig``, ``Callback`` and ``Event`` are imported when they are first used: this import stays light.
Their types stand in ``__init__.pyi``.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "train": "opdengine.training.api",
    "TrainConfig": "opdengine.config.train",
    "Callback": "opdengine.training.callbacks",
    "Event": "opdengine.training.callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
