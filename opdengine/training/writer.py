"""Metrics of a run: one JSON line a step always, trackers on top."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opdengine.training.trackers import Tracker, rows_for_table

logger = logging.getLogger(__name__)

NONE: Mapping[str, Tracker] = MappingProxyType({})


class MetricsWriter:
    """Appends to ``metrics.jsonl``, and hands everything on to trackers.

    Args:
        folder: of the run.
        trackers: by name; one that fails is told about once, and the run goes on.
        last_step: lines of later steps (written by a run that was interrupted after its last
            checkpoint) are removed, so that every step occurs once.
    """

    def __init__(self, folder: Path, trackers: Mapping[str, Tracker] = NONE, last_step: int = -1) -> None:
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
        self._trackers, self._failures = trackers, Counter[str]()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint that follows must not outlive its rows
        self._hand_on(lambda tracker: tracker.log(step, values))

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show trackers some rows; the run's own files hold them all."""
        if self._trackers and rows:
            shown = rows_for_table(rows)
            self._hand_on(lambda tracker: tracker.table(name, step, shown))

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        self._hand_on(lambda tracker: tracker.close())
        for name, count in self._failures.items():
            logger.warning("the tracker %s failed %d times and lacks what metrics.jsonl has", name, count)

    def _hand_on(self, say: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                say(tracker)
            except Exception as error:  # each has errors of its own, and none is worth a run
                if not self._failures[name]:
                    logger.warning("the tracker %s failed (%s): the run goes on, metrics.jsonl has all", name, error)
                self._failures[name] += 1


class NoWriter:
    """The writer of ranks that do not write."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Leave it to the first rank."""

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
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
