"""Colors, sizes and helpers that all figures share (matplotlib's Agg backend, no global state).

The palette is that of Okabe and Ito, which color-blind readers can tell apart. A model has the same
color in all figures.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from tinyfusion_pl.artifacts import atomic_path

COLORS = {"teacher": "#0072B2", "pruned": "#D55E00", "recovered": "#009E73"}
KEPT, DROPPED, INK, FAINT = "#3B2E8C", "#C9CCD6", "#22252E", "#6B7080"
DPI = 160
WIDTH = 10.0  # inches; the page shows a figure about as wide as its text


def save_figure(figure: Figure, path: Path) -> bytes:
    """Save `figure` as PNG; returns its bytes."""
    with atomic_path(path) as temporary:
        # Without the version of matplotlib in the file, equal data gives equal bytes.
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return path.read_bytes()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    set_layout(figure, w_pad=0.08, h_pad=0.08)
    return figure


def set_layout(
    figure: Figure,
    *,
    w_pad: float | None = None,
    h_pad: float | None = None,
    wspace: float | None = None,
) -> None:
    """Set paddings of the constrained layout; None keeps a padding as it is."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=w_pad, h_pad=h_pad, wspace=wspace)


def step_axis(axes: Axes, *, num_ticks: int) -> None:
    """Label the x-axis with whole steps."""
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def title(axes: Axes, text: str, *, size: float = 11) -> None:
    """Set the title of a panel."""
    axes.set_title(text, loc="left", fontsize=size, color=INK)


def plain_ticks(axis: Axis) -> None:
    """Plain numbers as tick labels.

    matplotlib labels log scales with math text, which is off because of "$" in names.
    """
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def dress(axes: Axes) -> None:
    """Apply the common style of spines, ticks and labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.xaxis.label.set(size=10, color=INK)
    axes.yaxis.label.set(size=10, color=INK)
