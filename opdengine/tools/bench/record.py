"""The result file of a benchmark: what was asked, how, and the values of every seed; and its table."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdengine.metrics import write_jsonl
from opdengine.models.fingerprint import contents
from opdengine.training.evaluate import wilson

Z = 1.96


@dataclass(frozen=True)
class Outcome:
    """What one seed gave.

    Args:
        rows: of the table: ``value``, ``questions``, and ``stderr`` where the harness says one.
        details: more that belongs into the file.
        answers: what was written, for people; a file of its own.
    """

    rows: Mapping[str, Mapping[str, float]]
    details: Mapping[str, Any] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()


class Record:
    """A result file that is continued with the seeds it lacks, and never mixed with other settings.

    Args:
        file: where it is, or will be.
        name: of the benchmark.
        settings: all that the values depend on, but the seed.
        model: as it was named.

    Raises:
        ValueError: the file holds something else, or results of other settings.
    """

    def __init__(self, file: Path, name: str, settings: Mapping[str, Any], model: str) -> None:
        self.file = file
        self._content: dict[str, Any] = {"benchmark": name, "model": model, "settings": dict(settings), "seeds": {}}
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise ValueError(f"the folder of {str(file)!r} cannot be written to; name another file with --out")
        if not file.exists():
            return
        try:
            stored = json.loads(file.read_text("utf-8"))
            before, self._content["seeds"] = stored["settings"], dict(stored["seeds"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(file)!r} holds no results of opdengine bench; name another file with --out"
            ) from error
        now = json.loads(json.dumps(settings))
        if other := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            raise ValueError(
                f"{str(file)!r} holds results of other settings ({', '.join(other)}); remove it, or name another file "
                "with --out"
            )

    @property
    def seeds(self) -> list[int]:
        """Those whose values are here."""
        return sorted(map(int, self._content["seeds"]))

    def add(self, seed: int, outcome: Outcome) -> None:
        """Keep the values of one seed, and write the file, whole or not at all."""
        self._content["seeds"][str(seed)] = {"rows": outcome.rows, **outcome.details}
        self._content["table"] = self.table()
        if outcome.answers:
            write_jsonl(self.file.with_suffix(f".seed_{seed}.jsonl"), outcome.answers)
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(self._content, indent=1) + "\n", "utf-8")
        partial.replace(self.file)

    def table(self) -> list[dict[str, Any]]:
        """A mapping per row: ``name, questions, mean, low, high, seeds`` (the value of each).

        The interval is Wilson's 95 % over the questions, of the mean over seeds and answers; of a value that is no
        share it is made from the harness's standard error.
        """
        found = [seed["rows"] for _, seed in sorted(self._content["seeds"].items(), key=lambda item: int(item[0]))]
        return [_summary(name, [rows[name] for rows in found if name in rows]) for name in (found[0] if found else ())]

    def markdown(self) -> str:
        """The table for people."""
        lines = [f"| {self._content['benchmark']} | questions | mean | 95 % | seeds |", "|---|---:|---:|---:|---|"]
        for row in self.table():
            values = ", ".join(f"{100 * value:.1f}" for value in row["seeds"])
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            lines.append(f"| {row['name']} | {row['questions']} | {100 * row['mean']:.1f} | {interval} | {values} |")
        return "\n".join(lines)


def _summary(name: str, values: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    each = [row["value"] for row in values]
    mean, count = sum(each) / len(each), int(values[0]["questions"])
    if all(0 <= value <= 1 for value in each):
        low, high = wilson(mean * count, count)
    else:
        half = Z * sum(row.get("stderr", math.nan) for row in values) / len(values)
        low, high = mean - half, mean + half
    return {"name": name, "questions": count, "mean": mean, "low": low, "high": high, "seeds": each}


def file_of(model: str, name: str) -> Path:
    """Where the results of a model are kept: in the run's folder, else below ``bench`` here.

    ``RUN/final`` -> ``RUN/bench/NAME.json``, ``RUN/checkpoints/step_9`` -> ``RUN/bench/step_9/NAME.json``, another
    model -> ``bench/MODEL/NAME.json``.
    """
    folder = Path(model)
    file = "".join(c if c.isalnum() or c in "_-." else "_" for c in name) + ".json"
    if folder.name == "final":
        return folder.parent / "bench" / file
    if folder.parent.name == "checkpoints":
        return folder.parent.parent / "bench" / folder.name / file
    return Path("bench") / folder.name / file


def identity(model: str, trust_remote_code: bool) -> str:
    """A short name for the content of a model."""
    found = contents(model, trust_remote_code) or {"name": model}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
