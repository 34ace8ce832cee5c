"""Metrics of a run: one JSON line a step always, trackers on top."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.errors import ConfigError

logger = logging.getLogger(__name__)


def require_trackers(report_to: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    if "tensorboard" in report_to and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("report_to: [tensorboard] needs a package: pip install tensorboard")


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to TensorBoard where asked.

    Args:
        folder: of the run.
        report_to: trackers besides the file.
        last_step: lines of later steps (written by a run that was interrupted after its last
            checkpoint) are removed, so that every step occurs once.
    """

    def __init__(self, folder: Path, report_to: Sequence[str] = (), last_step: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.is_file():
            kept = [line for line in read_metrics(self.path) if line["step"] <= last_step]
            partial = self.path.with_suffix(".tmp")
            with partial.open("w") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        self._file = self.path.open("a")
        self._tensorboard: Any = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint that follows must not outlive its rows
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NoWriter:
    """The writer of ranks that do not write."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Leave it to the first rank."""

    def close(self) -> None:
        """Nothing is open."""


def read_metrics(path: Path, warn: bool = True) -> list[dict[str, Any]]:
    """All rows of a metrics file, without lines that are none (a last one cut off by a crash, say).

    Args:
        path: of the file.
        warn: about lines that are left out.
    """
    rows, broken = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        row = _metrics_row(text)
        if row is not None:
            rows.append(row)
        elif text.strip():
            broken.append(number)
    if broken and warn:
        logger.warning("%s: line(s) %s are no metrics and are left out", path, ", ".join(map(str, broken)))
    return rows


def _metrics_row(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
