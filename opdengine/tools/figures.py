"""Figures of reports: the one place that draws, with matplotlib and without a screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.errors import ConfigError


def require_matplotlib() -> None:
    """Raise ConfigError where no figure can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError('figures need matplotlib: pip install "opdengine[demo]"') from error


@contextmanager
def figure(
    file: Path,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    *,
    legend_below: bool = False,
    **options: Any,
) -> Iterator[list[Any]]:
    """The axes of a new figure, row by row; the file is written when they have been drawn on.

    Args:
        file: of the picture; its ending is the format.
        size: inches, width and height.
        rows, columns: of panels.
        legend_below: one legend for all panels, that of the first one, below them.
        options: of ``pyplot.subplots``.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **options)
    try:
        yield list(axes.flat)
        below = 0.0
        if legend_below:
            handles, labels = axes.flat[0].get_legend_handles_labels()
            drawn.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=9)
            below = 0.08 + 0.05 * ((len(labels) + 2) // 3)
        drawn.tight_layout(rect=(0, below, 1, 1))
        drawn.savefig(file, dpi=130)
    finally:
        pyplot.close(drawn)


def curve(
    axis: Any, steps: Sequence[int], values: np.ndarray, label: str, half: np.ndarray | None, width: float
) -> None:
    """The mean of some runs over their steps, within a band.

    Args:
        axis: of a figure.
        steps: int [S].
        values: float [runs, S].
        label: of the legend.
        half: float [S], half the width of the band; None draws none.
        width: of the line, in points.
    """
    mean = values.mean(axis=0)
    (line,) = axis.plot(steps, mean, label=label, lw=width)
    if half is not None:
        axis.fill_between(steps, mean - half, mean + half, alpha=0.13, color=line.get_color())
