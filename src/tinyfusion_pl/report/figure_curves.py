"""The figure of training curves."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from tinyfusion_pl.report.drawing import (
    KEPT,
    WIDTH,
    dress,
    new_figure,
    plain_ticks,
    step_axis,
    title,
)
from tinyfusion_pl.report.reading import Curves
from tinyfusion_pl.report.words import CURVES


def plot_curves(curves: Curves) -> Figure | None:
    """A panel for each loss (thin: logged, bold: smoothed), validation metric and gate summary.

    None if `curves` has none of them.
    """
    names = [
        name
        for prefix in ("train/loss", "search/loss", "val/")
        for name in curves
        if name.startswith(prefix)
    ]
    names += [name for name in CURVES if name.startswith("gates/") and name in curves]
    if not names:
        return None
    # Titles of more than 22 characters do not fit into a third of the width.
    wide = len(names) == 4 or max(len(CURVES.get(name, name)) for name in names) > 22
    num_columns = min(2 if wide else 3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = new_figure(WIDTH, 2.7 * num_rows)
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        steps, values = curves[name]
        noisy = name.startswith(("train/", "search/"))
        smooth = _smooth(values, width=max(1, len(values) // 40)) if noisy else values
        if noisy:
            axes.plot(steps, values, color=KEPT, linewidth=0.7, alpha=0.35, label="logged")
            if len(finite := values[np.isfinite(values)]) and 0 < 15 * finite.min() < finite.max():
                axes.set_yscale("log")
                plain_ticks(axes.yaxis)
        axes.plot(
            steps,
            smooth,
            color=KEPT,
            linewidth=1.8,
            label="smoothed",
            marker="." if len(values) < 15 else None,
        )
        shown, ends = CURVES.get(name, name), smooth[np.isfinite(smooth)]
        course = f"{_short(ends[0])} → {_short(ends[-1])}" if len(ends) else "never finite"
        title(axes, f"{shown}: {course}", size=10)
        axes.set(xlabel="training step", ylabel=name)
        step_axis(axes, num_ticks=4)
        axes.grid(axis="y", color="#E6E8EE", linewidth=0.8)
        dress(axes)
        if number == 1 and noisy:
            axes.legend(frameon=False, fontsize=9)
    return figure


def _smooth(values: np.ndarray, *, width: int) -> np.ndarray:
    """Centered mean of the finite ones among 2 `width` - 1 values, fewer at the ends."""
    window, finite = np.ones(2 * width - 1), np.isfinite(values)
    inner = slice(width - 1, width - 1 + len(values))
    count = np.convolve(finite, window)[inner]
    total = np.convolve(np.where(finite, values, 0.0), window)[inner]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
