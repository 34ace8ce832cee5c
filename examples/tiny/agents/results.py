"""Numbers of the agents' demos: intervals, the table and the figure, from what :mod:`tiny.agents.arms` keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from opdengine.tools.figures import figure
from opdengine.training.evaluate import wilson

SPLITS = ("valid_seen", "valid_unseen")
HEALTH = {
    "sage/skip": "SKIP",
    "sage/weak": "WEAK",
    "sage/strong": "STRONG",
    "sage/det_fail": "DET_FAIL",
    "sage/z": "Z",
}
T975 = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % points of Student's t by degrees of freedom; beyond the table 1.96 is close."""


def interval(shares: Sequence[float], games: int) -> tuple[float, float, float]:
    """(mean, low, high): Student's t over three seeds or more, else Wilson's over the games of one seed."""
    values = np.array(shares)
    mean = float(values.mean())
    if len(values) < 3:
        return mean, *wilson(round(mean * games), games)
    degrees = len(values) - 1
    half = (T975[degrees] if degrees < len(T975) else 1.96) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per line of the table: title, (mean, low, high) per split, health and seconds."""
    games, found = results["test_games"], []
    before = {"arm": "before", "title": "student before", "after": results["before"], "mean": {}, "seconds": None}
    for name in dict.fromkeys(("before", *(run["arm"] for run in results["runs"]))):
        of_arm = [before] if name == "before" else [run for run in results["runs"] if run["arm"] == name]
        found.append(
            {
                "name": name,
                "title": of_arm[0]["title"],
                "count": len(of_arm),
                **{s: interval([run["after"][f"{s}/success"] for run in of_arm], games) for s in SPLITS},
                **{
                    key: float(np.mean([run["after"][f"valid_unseen/{key}"] for run in of_arm]))
                    for key in ("turns", "invalid_action_rate")
                },
                "health": {k: float(np.mean([run["mean"][k] for run in of_arm])) for k in of_arm[0]["mean"]},
                "seconds": float(np.mean([run["seconds"] for run in of_arm])) if name != "before" else None,
            }
        )
    return found


def build_table(results: Mapping[str, Any]) -> Table:
    """Success before and after, with 95 % intervals, and what the judge said."""
    table = Table(
        title=f"Games won in percent, greedy, after {results['steps']} steps of {results['batch_size']} episodes\n"
        f"({results['test_games']} games a split; 95 % intervals: over three seeds or more, else over one seed's games)"
    )
    lines = rows(results)
    labels = [k for k in HEALTH if any(k in row["health"] for row in lines)]
    for heading in (
        "",
        "seen games",
        "unseen games",
        "turns",
        "invalid",
        *(HEALTH[k] for k in labels),
        "seeds",
        "seconds",
    ):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for row in lines:
        cells = [f"{100 * m:.1f} [{100 * low:.0f}, {100 * high:.0f}]" for m, low, high in (row[s] for s in SPLITS)]
        cells += [f"{row['turns']:.1f}", f"{100 * row['invalid_action_rate']:.0f} %"]
        shown = {k: f"{v:.2f}" if k == "sage/z" else f"{100 * v:.0f} %" for k, v in row["health"].items()}
        seeds, seconds = (str(row["count"]), f"{row['seconds']:.0f}") if row["seconds"] else ("", "")
        table.add_row(row["title"], *cells, *(shown.get(k, "") for k in labels), seeds, seconds)
        if row["name"] == "before":
            table.add_section()
    return table


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Success of every arm with its interval; success while training; what the judge said over the steps."""
    lines, runs = rows(results), results["runs"]
    judged = [run for run in runs if run["arm"] == "sage"]
    size = (15 if judged else 11, max(4.0, 0.42 * len(lines) + 1.2))
    with figure(file, size, columns=3 if judged else 2) as axes:
        places = np.arange(len(lines))[::-1]
        for offset, split in zip((0.18, -0.18), SPLITS, strict=True):
            mean, low, high = np.array([row[split] for row in lines]).T
            error = {"xerr": np.array([mean - low, high - mean]), "error_kw": {"lw": 1, "capsize": 2}}
            axes[0].barh(places + offset, mean, 0.34, label=f"{split.removeprefix('valid_')} games", **error)
        axes[0].set_yticks(places, [row["title"] for row in lines], fontsize=8)
        axes[0].set_xlabel("games won, greedy (95 % interval)")
        axes[0].set_xlim(0, 1)
        axes[0].legend(frameon=False, fontsize=8)
        played = [run for run in runs if "episodes/success" in run["curve"]]
        for number, name in enumerate(dict.fromkeys(run["arm"] for run in played)):
            of_arm = [run for run in runs if run["arm"] == name]
            curve = np.mean([run["curve"]["episodes/success"] for run in of_arm], axis=0)
            window = min(5, len(curve))
            smooth = np.convolve(curve, np.ones(window) / window, "valid")
            axes[1].plot(
                range(window, len(curve) + 1),
                smooth,
                label=of_arm[0]["title"],
                color=f"C{number % 10}",
                ls=("-", "--")[number // 10 % 2],
                lw=1.2,
            )
        axes[1].set_xlabel("optimiser step (mean of the last five)")
        axes[1].set_ylabel("episodes won while training")
        axes[1].legend(frameon=False, fontsize=6)
        if judged:
            keys = [key for key in HEALTH if key in judged[0]["curve"]]
            shares = [np.mean([run["curve"][key] for run in judged], axis=0) for key in keys]
            axes[2].stackplot(range(1, len(shares[0]) + 1), shares, labels=[HEALTH[key] for key in keys])
            axes[2].set_xlabel("optimiser step")
            axes[2].set_ylabel("share of the student's turns")
            axes[2].set_title(judged[0]["title"], fontsize=9)
            axes[2].legend(frameon=False, fontsize=7, loc="lower left")
