"""The figure of the main results: bars of speed, FID and accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tinyfusion_pl.report.drawing import COLORS, INK, WIDTH, dress, new_figure, title
from tinyfusion_pl.report.reading import models_in, numbers
from tinyfusion_pl.report.words import label, value


def plot_overview(metrics: dict[str, Any]) -> Figure | None:
    """Bars of speed, FID and accuracy of each measured model; None if nothing was measured."""
    better = {
        "images_per_second": "higher is better",
        "fid": "lower is better",
        "accuracy": "higher is better",
    }
    models = {
        model: numbers(metrics.get(model))
        for model in models_in(metrics)
        if numbers(metrics.get(model))
    }
    keys = [
        key
        for key in better
        if any(np.isfinite(section.get(key, np.nan)) for section in models.values())
    ]
    if not keys:
        return None
    figure = new_figure(WIDTH, 0.9 + 0.36 * len(models))
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(1, len(keys), number)
        heights = {
            model: section[key]
            for model, section in models.items()
            if np.isfinite(section.get(key, np.nan))
        }
        largest = max(heights.values()) or 1.0
        for row, model in enumerate(models):
            if model in heights:
                axes.barh(row, heights[model], height=0.7, color=COLORS.get(model, INK))
                written = value(key, heights[model])
                axes.text(
                    heights[model] + largest * 0.03,
                    row,
                    written,
                    va="center",
                    fontsize=10,
                    color=INK,
                )
        title(axes, f"{label(key)} ({better[key]})")
        axes.set(ylim=(len(models) - 0.5, -0.5), xlim=(0, largest * 1.3), xticks=[])
        axes.set_yticks(range(len(models)), models if number == 1 else [""] * len(models))
        dress(axes)
        axes.spines["bottom"].set_visible(False)
        for tick, model in zip(axes.get_yticklabels(), models, strict=True):
            tick.set(color=COLORS.get(model, INK), fontweight="bold", fontsize=10)
    return figure
