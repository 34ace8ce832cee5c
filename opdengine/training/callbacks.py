"""What a caller in Python is told of a run while it goes on, and how it ends one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opdengine.errors import ConfigError


@dataclass
class Event:
    """A step or an evaluation that is finished.

    Args:
        step: number of steps finished.
        metrics: of the step, or of the evaluation, by name.
        samples: rows as in ``rollouts/step_N.jsonl`` or ``evaluations/step_N.jsonl``; of a step none with
            ``log_completions: false``.
    """

    step: int
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()
    is_stopped: bool = field(default=False, init=False)

    def stop(self) -> None:
        """End the run after this step: ``final/`` is written, and a checkpoint where ``save_steps`` asks for any.

        After the evaluation of step 0 nothing is trained, and there is no checkpoint: ``final/`` is the student as it
        was given.
        """
        self.is_stopped = True


class Callback:
    """Hears of a run; inherit from it, or write any class with one of the two methods."""

    def on_step(self, event: Event) -> None:
        """A step is finished, and its files are written."""

    def on_evaluate(self, event: Event) -> None:
        """An evaluation is finished and its step's files are written; the one before the first step (step 0) too."""


@dataclass
class Callbacks:
    """The callbacks of a run, called one after the other on the first process.

    Args:
        callbacks: objects with ``on_step`` or ``on_evaluate``.

    Raises:
        ConfigError: an object has neither.
    """

    callbacks: Sequence[Any] = ()
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            if not any(callable(getattr(callback, name, None)) for name in ("on_step", "on_evaluate")):
                raise ConfigError(
                    f"callbacks: {type(callback).__name__} has neither on_step(event) nor on_evaluate(event); write one"
                )

    def __bool__(self) -> bool:
        return bool(self.callbacks)

    def tell(self, name: str, event: Event) -> None:
        """Call one method of all."""
        for callback in self.callbacks:
            if (method := getattr(callback, name, None)) is not None:
                method(event)
        self.stopped = self.stopped or event.is_stopped
