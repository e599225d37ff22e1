"""The report's figures, each a function from data to a `matplotlib.figure.Figure` (Agg, no global state).

`plot_decisions` follows TinyFusion (arXiv 2412.01199), figure 6: the kept blocks over the steps, confidence as
transparency. Colours are Okabe's and Ito's, told apart by colour-blind readers too, and mean the same model everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from tinyfusion_pl.artifacts import atomic_path

from .decisions import StackHistory
from .reading import Curves, models_in, numbers
from .words import CURVES, label, value

COLORS = {"teacher": "#0072B2", "pruned": "#D55E00", "recovered": "#009E73"}
KEPT, DROPPED, INK, FAINT = "#3B2E8C", "#C9CCD6", "#22252E", "#6B7080"
DPI = 160
WIDTH = 10.0  # inches; the page shows a figure about as wide as its text
MAX_STEPS_DRAWN = 600  # more columns than this are not told apart on 10 inches
MIN_COLUMNS, MAX_COLUMNS = 6, 10  # of sample images
FAINTEST = 0.14  # opacity at confidence 0: an undecided group stays visible

_PROBABILITY = LinearSegmentedColormap.from_list("probability", ["#FFFFFF", KEPT])


def opacity(confidence: Any) -> Any:
    """Confidence 0..1 -> opacity of the mark, linear; the key beside the figure shows the same."""
    return FAINTEST + (1 - FAINTEST) * np.asarray(confidence)


def plot_decisions(stacks: dict[str, StackHistory]) -> Figure:
    """A row for each block: marked where the decision of a step keeps it, as opaque as its group is confident."""
    figure, rows = _stack_figure(stacks, width_ratios=(60, 1))
    for (path, history), (axes, key) in zip(stacks.items(), rows, strict=True):
        chosen = _thin(len(history.steps))
        shade = np.empty((history.num_blocks, len(chosen), 4))  # (B, T, RGBA)
        shade[..., :3] = to_rgb(KEPT)
        shade[..., 3] = np.where(history.kept[chosen], opacity(history.confidence[chosen]), 0.0).T
        _raster(axes, history, chosen, shade)
        kept, since = int(history.kept[-1].sum()), history.settled_at
        stack = f"{path}: " if len(stacks) > 1 else ""
        title(
            axes,
            f"{stack}{kept} of {history.num_blocks} blocks stay; unchanged since step {since:,}",
        )
        ramp = np.empty((256, 1, 4))
        ramp[..., :3] = to_rgb(KEPT)
        ramp[..., 0, 3] = opacity(np.linspace(0, 1, 256))
        key.imshow(ramp, origin="lower", aspect="auto", extent=(0, 1, 0, 1))
        key.set(xticks=[], yticks=[0, 0.5, 1], ylabel="confidence of the group")
        key.yaxis.tick_right()
        key.yaxis.set_label_position("right")
        dress(key)
    return figure


def plot_block_probabilities(stacks: dict[str, StackHistory]) -> Figure:
    """Each block's probability of staying: over the steps as shades, at the end as bars, kept ones dark."""
    figure, rows = _stack_figure(stacks, width_ratios=(2, 1))
    for (path, history), (heat, bars) in zip(stacks.items(), rows, strict=True):
        chosen = _thin(len(history.steps))
        _raster(heat, history, chosen, _PROBABILITY(np.clip(history.probabilities[chosen], 0, 1).T))
        stack = f"{path}: " if len(stacks) > 1 else ""
        title(heat, f"{stack}probability that a block stays, from white (0) to dark (1)")
        colors = [KEPT if kept else DROPPED for kept in history.kept[-1]]
        bars.barh(range(history.num_blocks), history.probabilities[-1], height=0.72, color=colors)
        for group in history.groups:
            blocks, share = np.array(group["members"]), group["num_kept"] / group["num_blocks"]
            bars.vlines(
                [share] * len(blocks),
                blocks - 0.5,
                blocks + 0.5,
                color=FAINT,
                linewidth=1,
                linestyle="dotted",
            )
        title(bars, "at the last step")
        bars.set(
            xlim=(0, 1.005),
            ylim=heat.get_ylim(),
            xlabel="probability of staying (dotted: all equal)",
            yticks=[],
        )
        _group_borders(bars, history)
        dress(bars)
    swatches = [Patch(color=KEPT, label="stays"), Patch(color=DROPPED, label="leaves")]
    figure.legend(handles=swatches, loc="outside upper right", ncols=2, frameon=False, fontsize=10)
    return figure


def plot_scores(stacks: dict[str, dict[str, Any]]) -> Figure | None:
    """A bar for each block with the value that a criterion gave its unit, kept ones dark; None where no block has one."""
    scored = {path: stack for path, stack in stacks.items() if stack.get("scores")}
    if not scored:
        return None
    figure = new_figure(WIDTH, 2.3 * len(scored))
    for axes, (path, stack) in zip(
        figure.subplots(len(scored), 1, squeeze=False)[:, 0], scored.items(), strict=True
    ):
        units = stack.get("units") or [[block] for block in range(stack["num_blocks"])]
        blocks = [(block, score) for unit, score in zip(units, stack["scores"]) for block in unit]
        kept = set(stack["kept_blocks"])
        axes.bar(
            [b for b, _ in blocks],
            [s for _, s in blocks],
            width=0.72,
            color=[KEPT if b in kept else DROPPED for b, _ in blocks],
        )
        prefix = f"{path}: " if len(scored) > 1 else ""
        title(
            axes,
            f"{prefix}score of each block; what stays was chosen by {stack.get('criterion') or 'the criterion'}",
        )
        axes.set(xlabel="block", ylabel="score", xticks=sorted(b for b, _ in blocks))
        dress(axes)
    swatches = [Patch(color=KEPT, label="stays"), Patch(color=DROPPED, label="leaves")]
    figure.legend(handles=swatches, loc="outside upper right", ncols=2, frameon=False, fontsize=10)
    return figure


def plot_samples(
    samples: dict[str, np.ndarray], *, depths: dict[str, float] | None = None
) -> Figure:
    """Teacher, pruned and recovered below each other, drawn from the same noise and label in each column.

    Args:
        samples: `labels` (N,) and for some of the models uint8 images (N, C, H, W), C = 1 or 3.
        depths: number of blocks by model, for the row labels.
    """
    models = models_in(samples)
    labels, bands = samples["labels"], _sample_bands(samples["labels"])
    num_columns = max(MIN_COLUMNS, *map(len, bands))  # few images are not blown up
    aspect, gap = np.divide(*samples[models[0]].shape[2:]), 0.45  # sizes in image widths
    band_height = len(models) * aspect + gap
    figure = new_figure(WIDTH, max(1.6, WIDTH * 0.88 / num_columns * len(bands) * band_height))
    axes = figure.add_subplot()
    for band, indices in enumerate(bands):
        top = band * band_height + gap
        for column, index in enumerate(indices):
            header = {"ha": "center", "va": "bottom", "fontsize": 10, "color": INK}
            axes.text(column + 0.5, top - 0.1, f"label {labels[index]}", **header)
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
            style = {"color": COLORS.get(model, INK), "fontsize": 11, "fontweight": "bold"}
            axes.text(
                -0.012 * num_columns, upper + aspect / 2, name, ha="right", va="center", **style
            )
    axes.set(xlim=(0, num_columns), ylim=(len(bands) * band_height, 0), aspect="equal")
    axes.axis("off")
    return figure


def _sample_bands(labels: np.ndarray) -> list[list[int]]:
    """Which samples to show: up to `MAX_COLUMNS` labels, spread over those there are; a second draw of each below.

    Of few labels, several draws stand beside each other.
    """
    distinct = np.unique(labels)
    if len(distinct) > MAX_COLUMNS:
        distinct = distinct[np.linspace(0, len(distinct) - 1, MAX_COLUMNS).round().astype(int)]
    draws = [np.flatnonzero(labels == which).tolist() for which in distinct]
    if (across := MAX_COLUMNS // len(distinct)) > 1:
        return [[index for own in draws for index in own[:across]]]
    bands = [[own[draw] for own in draws if len(own) > draw] for draw in range(2)]
    return [band for band in bands if band]


def plot_curves(curves: Curves) -> Figure | None:
    """A panel for each loss (logged thin, smoothed bold), validation metric and gate summary; None if there is none."""
    names = [
        name
        for prefix in ("train/loss", "search/loss", "val/")
        for name in curves
        if name.startswith(prefix)
    ]
    names += [name for name in CURVES if name.startswith("gates/") and name in curves]
    if not names:
        return None
    wide = (
        len(names) == 4 or max(len(CURVES.get(name, name)) for name in names) > 22
    )  # more does not fit into a third
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
        _step_axis(axes, num_ticks=4)
        axes.grid(axis="y", color="#E6E8EE", linewidth=0.8)
        dress(axes)
        if number == 1 and noisy:
            axes.legend(frameon=False, fontsize=9)
    return figure


def plot_overview(metrics: dict[str, Any]) -> Figure | None:
    """Bars of speed, FID and accuracy for each measured model; None if no model has any of them."""
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


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write `figure` as PNG; returns what was written."""
    with atomic_path(
        path
    ) as temporary:  # without the software's version in it: equal data, equal bytes
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return path.read_bytes()


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def _stack_figure(
    stacks: dict[str, StackHistory], *, width_ratios: tuple[int, ...]
) -> tuple[Figure, np.ndarray]:
    """A row of panels for each stack, as high as its blocks need."""
    heights = [max(1.3, 0.2 * history.num_blocks) for history in stacks.values()]
    figure = new_figure(WIDTH, sum(heights) + 0.95 * len(heights))
    figure.get_layout_engine().set(wspace=0.04)  # room for a tick label at the edge
    ratios = {"height_ratios": heights, "width_ratios": width_ratios}
    return figure, figure.subplots(len(stacks), len(width_ratios), squeeze=False, **ratios)


def _raster(axes: Axes, history: StackHistory, chosen: np.ndarray, colors: np.ndarray) -> None:
    """Blocks (rows, the first on top) over steps; a column lasts until the next recorded step. colors (B, T, RGBA)."""
    steps = history.steps[chosen]
    edges = np.append(steps, steps[-1] + (np.median(np.diff(steps)) if len(steps) > 1 else 1))
    axes.pcolormesh(edges, np.arange(history.num_blocks + 1) - 0.5, colors)
    for border in range(1, history.num_blocks):
        axes.axhline(border - 0.5, color="white", linewidth=1.2)
    _group_borders(axes, history)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(history.num_blocks - 0.5, -0.5))
    axes.set(xlabel="training step", ylabel="block (0 comes first)")
    axes.yaxis.set_major_locator(FixedLocator(range(history.num_blocks)))
    _step_axis(axes, num_ticks=8)
    dress(axes)


def _group_borders(axes: Axes, history: StackHistory) -> None:
    group_of = {
        block: number for number, group in enumerate(history.groups) for block in group["members"]
    }
    for block in range(
        1, history.num_blocks
    ):  # a group of mirrored units lies on both sides of the inner ones
        if group_of.get(block - 1) != group_of.get(block):
            axes.axhline(block - 0.5, color=FAINT, linewidth=0.8, gid="group border")


def _thin(num_steps: int) -> np.ndarray:
    """Evenly spread rows, first and last among them."""
    return np.unique(
        np.linspace(0, num_steps - 1, min(num_steps, MAX_STEPS_DRAWN)).round().astype(int)
    )


def _smooth(values: np.ndarray, *, width: int) -> np.ndarray:
    """Centred mean over 2 `width` - 1 logged values, fewer at the ends; values that are not finite do not count."""
    window, finite = np.ones(2 * width - 1), np.isfinite(values)
    inner = slice(width - 1, width - 1 + len(values))
    count = np.convolve(finite, window)[inner]
    total = np.convolve(np.where(finite, values, 0.0), window)[inner]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def _step_axis(axes: Axes, *, num_ticks: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def title(axes: Axes, text: str, *, size: float = 11) -> None:
    axes.set_title(text, loc="left", fontsize=size, color=INK)


def plain_ticks(axis: Axis) -> None:
    """Numbers as they are written: powers on a log scale would be formulas, which names with a dollar sign must not become."""
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.xaxis.label.set(size=10, color=INK)
    axes.yaxis.label.set(size=10, color=INK)
