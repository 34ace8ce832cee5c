"""A run's folder as the data of its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.config.loading import read_settings
from opdengine.config.yaml_text import plain
from opdengine.errors import ConfigError
from opdengine.tools.report.samples import Budget, Texts, clean, debates, evaluations, rollouts, shortened
from opdengine.training.writer import read_metrics

POINTS = 1500
"""Most points of a curve."""
DROPPED = "dropped/"


def read_runs(folders: Sequence[Path], size: int) -> dict[str, Any]:
    """The data of a page about several runs.

    Args:
        folders: of the runs.
        size: bytes that their data may take together.

    Raises:
        ConfigError: a folder holds no run; names it.
    """
    texts = Texts()
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise ConfigError(f"{str(folder)!r} holds no run (metrics.jsonl is missing); name the output_dir of a run")
    runs = [read_run(folder, texts, size // len(folders)) for folder in folders]
    for run, name in zip(runs, distinct(folders), strict=True):
        run["name"] = name
    return {"runs": runs, "texts": texts.values}


def distinct(folders: Sequence[Path]) -> list[str]:
    """Names of the folders: as much of the end of each path as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        if len(set(names)) == len(names):
            return names
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return [f"{name} ({i})" for i, name in enumerate(names, start=1)]


def read_run(folder: Path, texts: Texts, size: int) -> dict[str, Any]:
    """One run."""
    rows = read_metrics(folder / "metrics.jsonl", warn=False)
    found = rollouts(folder, texts, Budget(size * 6 // 10))
    prompts = {str(row["prompt_id"]): row["prompt"] for row in found["rows"] if "prompt_id" in row}
    config = folder / "config.yaml"
    settings = plain(read_settings(config)) if config.is_file() else {}
    return {
        "path": str(folder),
        "method": str(settings.get("method", "")),
        "settings": {key: shortened(value) for key, value in flat(settings).items()},
        "steps": max((row["step"] for row in rows), default=0),
        "max_steps": settings.get("max_steps"),
        "finished": (folder / "final").is_dir(),
        "curves": curves(rows),
        "totals": totals(rows),
        "rollouts": found,
        "debates": debates(folder, texts, prompts, Budget(size // 10)),
        "evaluations": evaluations(folder, texts, Budget(size * 2 // 10)),
    }


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Any]]]:
    """Steps and values of every metric; of long runs a part of the points, the extreme values among them."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(name, []).append((row["step"], float(value)))
    return {name: _columns(thin(found)) for name, found in sorted(points.items())}


def _columns(points: Sequence[tuple[int, float]]) -> list[list[Any]]:
    values = [float(f"{value:.6g}") if math.isfinite(value) else None for _, value in points]
    return [[step for step, _ in points], values]


def thin(points: Sequence[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """At most so many points: the first and the last, and of every stretch its lowest and its highest."""
    if len(points) <= most:
        return list(points)
    kept, stretches = {0, len(points) - 1}, (most - 2) // 2
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        finite = [place for place in stretch if math.isfinite(points[place][1])] or list(stretch)
        kept |= {min(finite, key=lambda place: points[place][1]), max(finite, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the whole run: what was sampled, kept and dropped, and the seconds of each phase."""
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            counted = name.startswith((DROPPED, "timing/")) or name in ("completions/sampled", "completions/kept")
            if counted and isinstance(value, int | float) and math.isfinite(value):
                sums[name] = sums.get(name, 0.0) + value
    dropped = {k.removeprefix(DROPPED): v for k, v in sums.items() if k.startswith(DROPPED) and v}
    seconds = {k.removeprefix("timing/"): round(v, 3) for k, v in sums.items() if k.startswith("timing/")}
    return {
        "sampled": sums.get("completions/sampled", 0.0),
        "kept": sums.get("completions/kept", 0.0),
        "dropped": dict(sorted(dropped.items(), key=lambda item: -item[1])),
        "seconds": seconds,
    }


def flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """Settings by their dotted names, as text; lists of sections by number."""
    if isinstance(settings, Mapping) and settings:
        parts: list[tuple[str, Any]] = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list) and any(isinstance(value, Mapping) for value in settings):
        parts = [(str(number), value) for number, value in enumerate(settings)]
    else:
        return {prefix: "" if settings is None else str(clean(settings))} if prefix else {}
    found: dict[str, str] = {}
    for key, value in parts:
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found
