"""The best checkpoint by a metric of the evaluations, and the end of a run that no longer gets better."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.models.checkpoint import list_checkpoints, step_of

logger = logging.getLogger(__name__)

PREFIX = "eval/"


@dataclass
class Best:
    """Remembers which evaluation was the best one, and for how many nothing was better.

    Args:
        metric: a name in ``metrics.jsonl`` that begins with "eval/".
        greater: whether more is better.
        patience: evaluations without improvement after which a run ends; None: it never does.
        threshold: by how much a value must be better to count as an improvement.
        value, step: of the best evaluation so far.
        waited: evaluations since the last improvement.
    """

    metric: str
    greater: bool
    patience: int | None = None
    threshold: float = 0.0
    value: float | None = None
    step: int | None = None
    waited: int = 0

    @classmethod
    def from_config(cls, config: TrainConfig) -> Best | None:
        """None where no metric is named."""
        name = config.metric_for_best_model
        if name is None:
            return None
        metric = name if name.startswith(PREFIX) else PREFIX + name.removeprefix("eval_")
        greater = config.greater_is_better
        if greater is None:
            greater = _is_better_when_greater(metric)
            logger.info("%s: %s is better", metric, "more" if greater else "less")
        return cls(metric, greater, config.early_stopping_patience, config.early_stopping_threshold)

    def require(self, measured: Mapping[str, float]) -> None:
        """Raise ConfigError unless the evaluations measure the metric."""
        if self.metric not in measured:
            known = sorted(name for name in measured if name.startswith(PREFIX))
            raise ConfigError(
                f"metric_for_best_model={self.metric!r} is not measured by the evaluations of this run; choose one of "
                f"{known}"
            )

    def look(self, step: int, measured: Mapping[str, float]) -> bool:
        """Take an evaluation into account; return whether it is the best so far. The first of equals stays the best.

        One that lacks the metric, since every episode broke, say, is no better than the ones before.
        """
        value = measured.get(self.metric, math.nan)
        if self.metric not in measured:
            logger.warning("step %d: this evaluation gave no %s, and is not the best one", step, self.metric)
        gain = math.nan if math.isnan(value) else math.inf
        if self.value is not None:
            gain = value - self.value if self.greater else self.value - value
        self.waited = 0 if gain > self.threshold else self.waited + 1
        if not gain > 0:
            return False
        self.value, self.step = value, step
        return True

    @property
    def exhausted(self) -> bool:
        """Whether the run has gone on for long enough without an improvement."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"metric": self.metric, "value": self.value, "step": self.step, "waited": self.waited}

    def restore(self, saved: Mapping[str, Any] | None, checkpoints: Path) -> None:
        """Go on where a run stopped; what belongs to another metric, or to a checkpoint that is gone, is forgotten."""
        if not saved or saved["step"] is None:
            return
        steps = [step_of(checkpoint) for checkpoint in list_checkpoints(checkpoints)]
        if saved["metric"] != self.metric or saved["step"] not in steps:
            logger.warning(
                "the best checkpoint so far (%s %.4g at step %d) is not taken over, as %s: the best is sought anew",
                saved["metric"], saved["value"], saved["step"],
                "it is gone" if saved["metric"] == self.metric else f"the metric is {self.metric} now",
            )  # fmt: skip
            return
        self.value, self.step, self.waited = saved["value"], saved["step"], saved["waited"]


def _is_better_when_greater(metric: str) -> bool:
    """Whether more is better of a metric of evaluations; what follows "accuracy" is a name from the data."""
    parts = metric.partition("@")[0].split("/")
    if "accuracy" in parts:
        return True
    return "verifier_failed" not in parts and not parts[-1].endswith(("loss", "rate", "ratio", "broken", "turns"))
