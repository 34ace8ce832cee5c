"""What a study shows: means with their 95 % intervals, differences taken seed by seed, and accuracy over steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.tools.figures import curve, figure
from opdengine.training.evaluate import wilson

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom."""


def interval(values: np.ndarray) -> float:
    """Half width of the 95 % interval of the mean of [n] values; NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return float(T95[min(len(values) - 2, len(T95) - 1)] * values.std(ddof=1) / np.sqrt(len(values)))


def shown(values: np.ndarray, count: int | None) -> str:
    """The mean of [seeds] percentages with its 95 % interval: over seeds, or over the prompts of one seed.

    Args:
        values: the accuracies.
        count: number of prompts; None says nothing about a single seed.
    """
    mean = f"{values.mean():.1f}"
    if len(values) > 1:
        return f"{mean} ± {interval(values):.1f}"
    if count is None:
        return mean
    low, high = wilson(round(values[0] * count / 100), count)
    return f"{mean} ({100 * low:.0f} to {100 * high:.0f})"


def columns(results: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> heading."""
    return {"eval/accuracy": "mean", **{f"eval/accuracy/{s}": title for s, title in results["skills"].items()}}


def final(results: Mapping[str, Any], arm: str, metric: str) -> np.ndarray:
    """[seeds] accuracy of an arm at the end, percent, in the order of the seeds."""
    mine = {r["seed"]: r["curve"][-1][metric] for r in results["runs"] if r["arm"] == arm}
    return 100 * np.array([mine[seed] for seed in results["seeds"] if seed in mine])


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table: models, then arms with intervals and the paired difference to the method."""
    rows, metrics, counts = [], columns(results), results.get("held_out", {})
    for title, graded in results["models"].items():
        rows.append([title, *(shown(100 * np.array([graded[m]]), counts.get(m)) for m in metrics), "", ""])
    method = results["arms"][0]["name"]
    for arm in results["arms"]:
        cells = [arm["title"]]
        cells += [shown(final(results, arm["name"], metric), counts.get(metric)) for metric in metrics]
        difference = final(results, arm["name"], "eval/accuracy") - final(results, method, "eval/accuracy")
        half = interval(difference)
        paired = "" if arm["name"] == method else f"{difference.mean():+.1f}"
        seconds = np.mean([r["seconds"] for r in results["runs"] if r["arm"] == arm["name"]])
        rows.append([*cells, paired + ("" if not paired or np.isnan(half) else f" ± {half:.1f}"), f"{seconds:.0f}"])
    return rows


def headings(results: Mapping[str, Any]) -> list[str]:
    """Of :func:`table_rows`."""
    return ["", *columns(results).values(), f"mean less {results['arms'][0]['title']}", "seconds"]


def measured(results: Mapping[str, Any]) -> dict[str, float]:
    """What the method's own runs report: means over steps, then over the seeds that have the metric."""
    mine = [run["metrics"] for run in results["runs"] if run["arm"] == results["arms"][0]["name"]]
    return {name: float(np.mean([m[name] for m in mine if name in m])) for name in sorted({k for m in mine for k in m})}


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Accuracy over steps, one panel per skill; bands are 95 % intervals over seeds."""
    metrics = columns(results)
    with figure(file, (4.6 * len(metrics), 3.8), columns=len(metrics), legend_below=True, sharey=True) as axes:
        for number, arm in enumerate(results["arms"]):
            curves = [r["curve"] for r in results["runs"] if r["arm"] == arm["name"]]
            steps = [point["step"] for point in curves[0]]
            for axis, metric in zip(axes, metrics, strict=True):
                values = np.array([[point[metric] for point in run] for run in curves])
                half = np.array([interval(column) for column in values.T]) if len(curves) > 1 else None
                curve(axis, steps, values, arm["title"], half, 1.3 if number else 2.6)
        for axis, title in zip(axes, metrics.values(), strict=True):
            axis.set_title(title)
            axis.set_xlabel("optimiser step")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("held-out accuracy")
