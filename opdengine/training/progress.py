"""What a terminal sees of a run: a bar, or lines with time and ETA elsewhere, sample completions, and a summary."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.config.train import TrainConfig
from opdengine.types import Sample
from opdengine.workers.printing import one_line

logger = logging.getLogger(__name__)

DROPPED, TIMING = "dropped/", "timing/"
SHOWN = {
    "learning_rate": "lr",
    "perf/tokens_per_second": "tok/s",
    "completions/mean_length": "mean_length",
    "eval/accuracy": "accuracy",
}


class Progress:
    """Shows the steps of a run.

    Args:
        config: of the run.
        start: steps already done.
        enabled: off shows nothing.
    """

    def __init__(self, config: TrainConfig, start: int, enabled: bool = True) -> None:
        self.config = config
        self.total = config.max_steps
        self.every = max(config.logging_steps, config.max_steps // 20, 1)
        self.start = self.step = start
        self.title = one_line(config.run_name or config.method)
        self.enabled = enabled
        self.sums: dict[str, float] = {}
        self.evaluated: dict[str, tuple[float, float]] = {}
        self._begun = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None
        self._moved: list[tuple[Any, Any]] = []

    def __enter__(self) -> Progress:
        self._begun = time.perf_counter()
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
            terminal = sys.stderr
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, metrics="")
            # The bar has put a stream that writes above it in place of standard error; log handlers hold the old one.
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                    self._moved.append((handler, handler.setStream(sys.stderr)))
        return self

    def advance(
        self, step: int, line: Mapping[str, float], latest: Mapping[str, float], samples: Sequence[Sample] = ()
    ) -> None:
        """One more step is done.

        Args:
            step: its number.
            line: its own metrics, for a log line; a step with an evaluation always has one.
            latest: the last value of every metric, for the bar.
            samples: of the step, one of which is shown every ``print_completions_steps`` steps.
        """
        self.step = step
        self._count(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=self._shown({**latest, **line}))
        elif self.enabled and (
            step % self.every == 0 or step == self.total or any(k.startswith("eval/") for k in line)
        ):
            logger.info("%s step %d/%d  %s%s", self.title, step, self.total, self._clock(), self._shown(line))
        every = self.config.print_completions_steps
        if self.enabled and every and samples and step % every == 0:
            logger.info("%s", _spoken(step, samples))

    def summary(self, folder: Path) -> list[str]:
        """What this process has done of the run, in a few lines: before -> after, times, drops, files.

        Args:
            folder: of the run.
        """
        done = self.step - self.start
        files = f"  files: {folder} (opdengine report {folder} shows them); model: {folder / 'final'}"
        if not done:
            return [f"{self.title}: no step was left to do: {self.step} of {self.total} had been done before", files]
        phases = {
            k.removeprefix(TIMING): v for k, v in self.sums.items() if k.startswith(TIMING) and k != "timing/step"
        }
        whole = sum(phases.values())
        if not self.config.debates and "debate" in phases:
            phases["contexts"] = phases.pop("debate")  # all that is done there is to write what teachers read
        shares = [f"{name} {value / whole:.0%}" for name, value in sorted(phases.items(), key=lambda i: -i[1]) if whole]
        taken = time.perf_counter() - self._begun
        times = f"{_seconds(taken)} ({_seconds(taken / done)} a step)"
        lines = [f"{self.title}: {done} steps in {times}; {', '.join(shares)}"]
        lines += [
            f"  {one_line(name)}: {first:.4g} -> {last:.4g}"
            for name, (first, last) in self.evaluated.items()
            if name.endswith(("accuracy", "/success", "/score")) or name == "reward/mean"
        ]
        dropped = {k.removeprefix(DROPPED): v for k, v in self.sums.items() if k.startswith(DROPPED) and v}
        reasons = ", ".join(f"{name} {count:g}" for name, count in sorted(dropped.items(), key=lambda i: -i[1]))
        sampled = self.sums.get("completions/sampled", 0.0)
        lines.append(f"  rollouts: {sampled:g}; dropped: {one_line(reasons) or 'none'}")
        return [*lines, files]

    def _count(self, line: Mapping[str, float]) -> None:
        for name, value in line.items():
            if not math.isfinite(value):
                continue
            if name.startswith((DROPPED, TIMING)) or name == "completions/sampled":
                self.sums[name] = self.sums.get(name, 0.0) + value
            elif name.startswith("eval/") or name == "reward/mean":
                self.evaluated[name] = (self.evaluated.get(name, (value, value))[0], value)

    def _clock(self) -> str:
        """Time so far, of this process, and until the end."""
        taken, done = time.perf_counter() - self._begun, self.step - self.start
        is_last = not done or self.step >= self.total
        left = "" if is_last else f"ETA {_seconds(taken / done * (self.total - self.step))}  "
        return f"{_seconds(taken)}  {left}"

    def _shown(self, metrics: Mapping[str, float]) -> str:
        """The numbers of a line: what tells whether the student comes nearer to its teachers, then the speed."""
        kls = [value for name, value in metrics.items() if name.startswith("teacher_kl/")]
        named = {} if self._is_surrogate(metrics) or "loss" not in metrics else {"loss": metrics["loss"]}
        if "gap/mean" in metrics and not named:
            named["gap"] = metrics["gap/mean"]
        if kls:
            named["KL"] = sum(kls) / len(kls)
        if "timing/step" in metrics:
            named["s/step"] = metrics["timing/step"]
        named |= {short: metrics[name] for name, short in SHOWN.items() if name in metrics}
        named |= {
            one_line(name.removeprefix("eval/")): value
            for name, value in metrics.items()
            if name.startswith("eval/") and name.endswith("/success")
        }
        return "  ".join(f"{name} {value:.4g}" for name, value in named.items())

    def _is_surrogate(self, metrics: Mapping[str, float]) -> bool:
        """Whether the loss is that of a policy gradient, whose value says nothing."""
        config = self.config
        return ("advantage/tokens" in metrics and config.advantage.kl_mode == "sampled") or (
            config.method == "sage_opd" and config.sage.kl_mode == "sampled"
        )

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            for handler, stream in self._moved:
                handler.setStream(stream)


def _spoken(step: int, samples: Sequence[Sample]) -> str:
    """One completion of a step, preferably one that is trained on."""
    sample = next((sample for sample in samples if not sample.drop), samples[0])
    reward = "" if sample.reward is None else f", reward {sample.reward:g}"
    left = f", dropped: {sample.drop}" if sample.drop else ""
    return f"step {step}, prompt {one_line(sample.prompt.id)}{reward}{left}: {one_line(sample.text, 600) or '(empty)'}"


def _seconds(value: float) -> str:
    """A duration in the unit that fits."""
    if value >= 5400:
        return f"{value / 3600:.1f} h"
    return f"{value / 60:.1f} min" if value >= 90 else f"{value:.3g} s"
