"""Figures of sweeps and analyses.

Losses of candidates, speed-up and activations follow TinyFusion (figures 5, 4 and 8), quality over
depth follows PPCL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinyfusion_pl.report.drawing import (
    COLORS,
    FAINT,
    INK,
    KEPT,
    WIDTH,
    dress,
    new_figure,
    plain_ticks,
    save_figure,
    title,
)

NUM_BINS = 60
LINES = ("dotted", "dashed", "dashdot")


def write_candidate_losses(
    path: Path, losses: np.ndarray, marks: Mapping[str, float], *, measure: str
) -> Path:
    """Save `plot_candidate_losses` as PNG; returns `path`."""
    with matplotlib.rc_context({"text.parse_math": False}):
        save_figure(plot_candidate_losses(losses, marks, measure=measure), path)
    return path


def plot_candidate_losses(
    losses: np.ndarray, marks: Mapping[str, float], *, measure: str = "loss"
) -> Figure:
    """A histogram of the losses of all structures, with a line for the choice of each criterion.

    Args:
        losses: Losses (S,) of all structures.
        marks: Name of a criterion -> loss of its choice.
        measure: ``"loss"`` or ``"distance"``, for the label of the axis.
    """
    order = sorted(marks, key=lambda name: marks[name])
    figure = new_figure(WIDTH, 3.2 + 0.24 * len(order))
    axes = figure.add_subplot()
    finite = losses[np.isfinite(losses)]
    positive = finite.min() > 0 and finite.max() / finite.min() > 20
    bins: int | Sequence[float] = NUM_BINS
    if positive:
        bins = np.geomspace(finite.min(), finite.max(), NUM_BINS + 1).tolist()
    counts = np.asarray(axes.hist(finite, bins=bins, color=FAINT, alpha=0.45)[0])
    if positive:
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    top = counts.max() or 1
    for row, name in enumerate(order):
        height = top * (1.08 + 0.11 * (len(order) - row))
        below = np.mean(finite < marks[name])
        axes.vlines(marks[name], 0, height, color=KEPT, linewidth=1.1)
        axes.text(
            marks[name],
            height,
            f" {name} ({100 * below:.2g}% are lower)",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set(
        ylim=(0, top * (1.2 + 0.11 * (len(order) + 1))),
        ylabel="structures",
        xlabel="calibration loss before recovery"
        if measure == "loss"
        else "distance to the teacher before recovery",
    )
    title(axes, f"{len(losses):,} structures; lines mark the choices of criteria")
    dress(axes)
    return figure


def write_speedup(path: Path, points: Sequence[tuple[str, float, float]]) -> Path:
    """Save `plot_speedup` as PNG; returns `path`."""
    with matplotlib.rc_context({"text.parse_math": False}):
        save_figure(plot_speedup(points), path)
    return path


def plot_speedup(points: Sequence[tuple[str, float, float]]) -> Figure:
    """Measured speed-up over depth compression, with the ideal line.

    Args:
        points: (name, compression, speed-up) of each model.
    """
    figure = new_figure(6.0, 4.6)
    axes = figure.add_subplot()
    most = max(max(compression, speed) for _, compression, speed in points) * 1.08
    axes.plot(
        [1, most],
        [1, most],
        color=FAINT,
        linestyle="dashed",
        linewidth=1.2,
        label="ideal: proportional to the number of blocks",
    )
    for name, compression, speed in points:
        axes.plot(compression, speed, "o", color=KEPT)
        axes.annotate(
            f" {name}: {speed:.2f}x", (compression, speed), fontsize=9, color=INK, va="top"
        )
    axes.set(
        xlabel="blocks of the teacher / blocks of the model", ylabel="measured speed-up of sampling"
    )
    axes.set(xlim=(0.95, most), ylim=(0.95, most))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    title(axes, "Speed-up over depth compression")
    dress(axes)
    return figure


def write_depth_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Save `plot_depth_curve` as PNG; returns `path`."""
    with matplotlib.rc_context({"text.parse_math": False}):
        save_figure(plot_depth_curve(rows), path)
    return path


def plot_depth_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Distance to the teacher and, if measured, FID over the depth of the models in `rows`."""
    panels = [
        (key, name)
        for key, name in (("teacher_distance", "distance to the teacher"), ("fid", "FID"))
        if any(key in row for row in rows)
    ]
    figure = new_figure(WIDTH, 3.2)
    for axes, (key, name) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        points = sorted((row["depth"], row[key]) for row in rows if key in row)
        axes.plot(*zip(*points), "o-", color=KEPT)
        axes.set(xlabel="blocks", ylabel=name, ylim=(0, 1.08 * max(value for _, value in points)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        dress(axes)
    title(figure.axes[0], "Restored runs of the teacher, without training")
    return figure


def write_activations(
    path: Path,
    histograms: Mapping[str, Mapping[str, Any]],
    statistics: Mapping[str, Mapping[str, Any]],
    *,
    num_sigma: Sequence[float],
) -> Path:
    """Save `plot_activations` as PNG; returns `path`."""
    with matplotlib.rc_context({"text.parse_math": False}):
        save_figure(plot_activations(histograms, statistics, num_sigma=num_sigma), path)
    return path


def plot_activations(
    histograms: Mapping[str, Mapping[str, Any]],
    statistics: Mapping[str, Mapping[str, Any]],
    *,
    num_sigma: Sequence[float],
) -> Figure:
    """Histograms of the hidden states of teacher and student, a row for each layer pair.

    Args:
        histograms: Pair -> side -> (counts, edges).
        statistics: Pair -> side -> "mean" and "sigma", for the lines at k sigma, and
            "largest_in_sigma".
        num_sigma: The values of k.
    """
    figure = new_figure(WIDTH, 1.9 * len(histograms))
    rows = figure.subplots(len(histograms), 2, squeeze=False)
    for row, (pair, sides) in zip(rows, histograms.items(), strict=True):
        for axes, (side, (counts, edges)) in zip(row, sides.items(), strict=True):
            axes.stairs(
                counts,
                edges,
                fill=True,
                color=COLORS["teacher" if side == "teacher" else "recovered"],
                alpha=0.7,
            )
            of_side = statistics[pair][side]
            for number, k in enumerate(num_sigma):
                style = LINES[number % len(LINES)]
                for sign in (-1, 1):
                    x = of_side["mean"] + sign * k * of_side["sigma"]
                    axes.axvline(x, color=INK, linewidth=0.9, linestyle=style)
            axes.set(yscale="log", ylim=(0.5, None))
            plain_ticks(axes.yaxis)
            title(axes, f"{side}; largest value {of_side['largest_in_sigma']:.0f} sigma", size=9)
            dress(axes)
        row[0].set_ylabel(
            pair.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8
        )
    rows[-1][0].set_xlabel(
        "value of the hidden states; lines at " + ", ".join(f"{k:g}" for k in num_sigma) + " sigma"
    )
    return figure
