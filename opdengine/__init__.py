"""opdengine: on-policy distillation of language models from one or more teachers.

``train``, ``TrainConfig``, ``Callback`` and ``Event`` are imported when they are first used: this import stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdengine.config.train import TrainConfig as TrainConfig
    from opdengine.training.api import train as train
    from opdengine.training.callbacks import Callback as Callback
    from opdengine.training.callbacks import Event as Event

__version__ = "0.1.0"

__all__ = ["Callback", "Event", "TrainConfig", "__version__", "train"]

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
