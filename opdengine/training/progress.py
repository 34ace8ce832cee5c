"""A progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from opdengine.config.train import TrainConfig
from opdengine.workers.printing import one_line

logger = logging.getLogger(__name__)

SHOWN = ("loss", "eval/accuracy", "completions/mean_length")


class Progress:
    """Shows the steps of a run.

    Args:
        config: of the run.
        start: steps already done.
        enabled: off shows nothing.
    """

    def __init__(self, config: TrainConfig, start: int, enabled: bool = True) -> None:
        self.total = config.max_steps
        self.every = max(config.logging_steps, config.max_steps // 20, 1)
        self.start = start
        self.title = one_line(config.run_name or config.method)
        self.enabled = enabled
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, metrics="")
        return self

    def advance(self, step: int, line: Mapping[str, float], latest: Mapping[str, float]) -> None:
        """One more step is done.

        Args:
            step: its number.
            line: its own metrics, for a log line; a step with an evaluation always has one.
            latest: the last value of every metric, for the bar.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=_shown(latest))
        elif self.enabled and (
            step % self.every == 0 or step == self.total or any(k.startswith("eval/") for k in line)
        ):
            logger.info("%s step %d/%d  %s", self.title, step, self.total, _shown(line))

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _shown(metrics: Mapping[str, float]) -> str:
    named = {key.split("/")[-1]: key for key in SHOWN if key in metrics}
    named |= {key.removeprefix("eval/"): key for key in metrics if key.startswith("eval/") and key.endswith("/success")}
    return "  ".join(f"{one_line(name)} {metrics[key]:.4g}" for name, key in named.items())
