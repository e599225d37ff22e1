"""Figures of the decision: kept blocks and probabilities over the steps, scores of a criterion.

`plot_decisions` follows TinyFusion (arXiv 2412.01199), figure 6: kept blocks over the steps, with
the confidence as opacity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

from tinyfusion_pl.report.decisions import StackHistory
from tinyfusion_pl.report.drawing import (
    DROPPED,
    FAINT,
    KEPT,
    WIDTH,
    dress,
    new_figure,
    set_layout,
    step_axis,
    title,
)

MAX_STEPS_DRAWN = 600  # more columns cannot be told apart on 10 inches
FAINTEST = 0.14  # opacity at confidence 0: an undecided group stays visible

_PROBABILITY = LinearSegmentedColormap.from_list("probability", ["#FFFFFF", KEPT])


def opacity(confidence: np.ndarray) -> np.ndarray:
    """Opacity of a mark, linear in the confidence 0..1; also shown by the color bar."""
    return FAINTEST + (1 - FAINTEST) * confidence


def plot_decisions(stacks: dict[str, StackHistory]) -> Figure:
    """A row for each block, marked at steps that keep it; opacity is its group's confidence."""
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
            f"{stack}{kept} of {history.num_blocks} blocks kept; unchanged since step {since:,}",
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
    """The probability of keeping each block: over the steps as shades, at the last step as bars."""
    figure, rows = _stack_figure(stacks, width_ratios=(2, 1))
    for (path, history), (heat, bars) in zip(stacks.items(), rows, strict=True):
        chosen = _thin(len(history.steps))
        _raster(heat, history, chosen, _PROBABILITY(np.clip(history.probabilities[chosen], 0, 1).T))
        stack = f"{path}: " if len(stacks) > 1 else ""
        title(heat, f"{stack}probability of keeping a block, from white (0) to dark (1)")
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
            xlabel="probability of keeping (dotted: uniform)",
            yticks=[],
        )
        _group_borders(bars, history)
        dress(bars)
    _legend(figure)
    return figure


def plot_scores(stacks: dict[str, dict[str, Any]]) -> Figure | None:
    """A bar for each block with the score of its unit; None if there are no scores."""
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
            f"{prefix}score of each block, chosen by {stack.get('criterion') or 'a criterion'}",
        )
        axes.set(xlabel="block", ylabel="score", xticks=sorted(b for b, _ in blocks))
        dress(axes)
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    swatches = [Patch(color=KEPT, label="kept"), Patch(color=DROPPED, label="removed")]
    figure.legend(handles=swatches, loc="outside upper right", ncols=2, frameon=False, fontsize=10)


def _stack_figure(
    stacks: dict[str, StackHistory], *, width_ratios: tuple[int, ...]
) -> tuple[Figure, np.ndarray]:
    """A figure with a row of panels for each stack."""
    heights = [max(1.3, 0.2 * history.num_blocks) for history in stacks.values()]
    figure = new_figure(WIDTH, sum(heights) + 0.95 * len(heights))
    set_layout(figure, wspace=0.04)  # room for a tick label at the edge
    panels = figure.subplots(
        len(stacks),
        len(width_ratios),
        squeeze=False,
        height_ratios=heights,
        width_ratios=width_ratios,
    )
    return figure, panels


def _raster(axes: Axes, history: StackHistory, chosen: np.ndarray, colors: np.ndarray) -> None:
    """Draw `colors` (B, T, RGBA): a row for each block, a column from each step to the next."""
    steps = history.steps[chosen]
    edges = np.append(steps, steps[-1] + (np.median(np.diff(steps)) if len(steps) > 1 else 1))
    axes.pcolormesh(edges, np.arange(history.num_blocks + 1) - 0.5, colors)
    for border in range(1, history.num_blocks):
        axes.axhline(border - 0.5, color="white", linewidth=1.2)
    _group_borders(axes, history)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(history.num_blocks - 0.5, -0.5))
    axes.set(xlabel="training step", ylabel="block (0 runs first)")
    axes.yaxis.set_major_locator(FixedLocator(range(history.num_blocks)))
    step_axis(axes, num_ticks=8)
    dress(axes)


def _group_borders(axes: Axes, history: StackHistory) -> None:
    group_of = {
        block: number for number, group in enumerate(history.groups) for block in group["members"]
    }
    # A group of mirrored units has blocks on both sides of the inner groups.
    for block in range(1, history.num_blocks):
        if group_of.get(block - 1) != group_of.get(block):
            axes.axhline(block - 0.5, color=FAINT, linewidth=0.8, gid="group border")


def _thin(num_steps: int) -> np.ndarray:
    """At most `MAX_STEPS_DRAWN` evenly spaced rows, with the first and the last."""
    return np.unique(
        np.linspace(0, num_steps - 1, min(num_steps, MAX_STEPS_DRAWN)).round().astype(int)
    )
