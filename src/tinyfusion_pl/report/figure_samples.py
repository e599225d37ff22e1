"""The figure of generated images: a row for each model."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from tinyfusion_pl.report.drawing import COLORS, INK, WIDTH, new_figure
from tinyfusion_pl.report.reading import models_in

MIN_COLUMNS, MAX_COLUMNS = 6, 10


def plot_samples(
    samples: dict[str, np.ndarray], *, depths: dict[str, float] | None = None
) -> Figure:
    """A row of images for each model; the images of a column share noise and label.

    Args:
        samples: `labels` (N,) and, for some of the models, uint8 images (N, C, H, W), C = 1 or 3.
        depths: Number of blocks of each model, for the row labels.
    """
    models = models_in(samples)
    labels, bands = samples["labels"], _sample_bands(samples["labels"])
    num_columns = max(MIN_COLUMNS, *map(len, bands))  # few images are not enlarged
    aspect, gap = np.divide(*samples[models[0]].shape[2:]), 0.45  # sizes in image widths
    band_height = len(models) * aspect + gap
    figure = new_figure(WIDTH, max(1.6, WIDTH * 0.88 / num_columns * len(bands) * band_height))
    axes = figure.add_subplot()
    for band, indices in enumerate(bands):
        top = band * band_height + gap
        for column, index in enumerate(indices):
            axes.text(
                column + 0.5,
                top - 0.1,
                f"label {labels[index]}",
                ha="center",
                va="bottom",
                fontsize=10,
                color=INK,
            )
        for row, model in enumerate(models):
            upper = top + row * aspect
            for column, index in enumerate(indices):
                image = samples[model][index].transpose(1, 2, 0)  # (H, W, C)
                image = image.repeat(3, axis=2) if image.shape[2] == 1 else image
                extent = (
                    column + 0.02,
                    column + 0.98,
                    upper + aspect * 0.98,
                    upper + aspect * 0.02,
                )
                axes.imshow(image, extent=extent, interpolation="nearest", gid=f"{model}/{index}")
            name = f"{model}\n{depths[model]:.0f} blocks" if depths and model in depths else model
            axes.text(
                -0.012 * num_columns,
                upper + aspect / 2,
                name,
                ha="right",
                va="center",
                color=COLORS.get(model, INK),
                fontsize=11,
                fontweight="bold",
            )
    axes.set(xlim=(0, num_columns), ylim=(len(bands) * band_height, 0), aspect="equal")
    axes.axis("off")
    return figure


def _sample_bands(labels: np.ndarray) -> list[list[int]]:
    """Indices of the samples to show, by band of rows.

    Up to `MAX_COLUMNS` evenly spaced labels, with a second sample of each in a second band. If
    there are few labels, several samples of each share one band.
    """
    distinct = np.unique(labels)
    if len(distinct) > MAX_COLUMNS:
        distinct = distinct[np.linspace(0, len(distinct) - 1, MAX_COLUMNS).round().astype(int)]
    draws = [np.flatnonzero(labels == which).tolist() for which in distinct]
    if (across := MAX_COLUMNS // len(distinct)) > 1:
        return [[index for own in draws for index in own[:across]]]
    bands = [[own[draw] for own in draws if len(own) > draw] for draw in range(2)]
    return [band for band in bands if band]
