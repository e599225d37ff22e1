"""Summarize the tables in docs/results: a Markdown table and a figure of criteria over teachers and depths.

Reads the CSV files that sweeps write (one line per arm), groups arms that differ only in their
seed, and writes `docs/results/summary.md` and `docs/results/criteria.png`.

    python benchmarks/results.py [--folder docs/results]
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

TEACHERS = {
    "digits_teacher": "A: digits_teacher, 12 blocks",
    "digits_permuted": "B: digits_permuted, 12 blocks",
    "digits_deep": "C: digits_deep, 24 blocks",
}
FID, DISTANCE, CHOICE = "FID", "distance to the teacher", "choice (block runs)"
Cell = tuple[str, int]  # teacher, blocks


def read_arms(paths: Iterable[Path]) -> list[dict[str, str]]:
    """Lines of all files; a column that a file lacks is empty."""
    return [line for path in paths for line in csv.DictReader(path.read_text().splitlines())]


def describe(arm: dict[str, str]) -> str:
    """Name of the criterion, with the options that set it apart."""
    name = arm["pruning"]
    if arm.get("pruning.pattern"):
        name += " " + arm["pruning.pattern"].strip('"')
    return name + (" + trials" if arm.get("pruning.candidates") else "")


def group(arms: Iterable[dict[str, str]]) -> dict[Cell, dict[str, list[dict[str, str]]]]:
    """Finished arms by teacher and depth, then by criterion, in the order of their seeds."""
    cells: dict[Cell, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for arm in sorted(arms, key=lambda arm: int(arm["seed"])):
        if arm[FID]:
            cells[arm["model"], int(arm["blocks"])][describe(arm)].append(arm)
    order = list(TEACHERS)
    return dict(sorted(cells.items(), key=lambda item: (order.index(item[0][0]), -item[0][1])))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def column(arms: Sequence[dict[str, str]], key: str, scale: float = 1.0) -> list[float]:
    """Values of one column, times `scale`."""
    return [float(arm[key]) * scale for arm in arms]


def blocks(arm: dict[str, str]) -> str:
    """Indices of the kept blocks, runs of three or more shortened."""
    kept = next(iter(json.loads(arm["kept_blocks"]).values()))
    runs: list[list[int]] = []
    for index in kept:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return " ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs
    )


def to_markdown(cells: dict[Cell, dict[str, list[dict[str, str]]]]) -> str:
    """One table per cell, the smallest distance first."""
    lines = []
    for (teacher, depth), criteria in cells.items():
        lines += [
            f"### {TEACHERS[teacher]}, {depth} kept",
            "",
            "| criterion | seeds | distance x 1000 | FID | cost, block runs | kept blocks |",
            "|---|---|---|---|---|---|",
        ]
        for name, arms in sorted(
            criteria.items(), key=lambda item: mean(column(item[1], DISTANCE))
        ):
            kept = list(dict.fromkeys(blocks(arm) for arm in arms))
            lines.append(
                f"| {name} | {len(arms)} | {spread(column(arms, DISTANCE, 1000), 2)} "
                f"| {spread(column(arms, FID), 2)} | {mean(column(arms, CHOICE)):,.0f} "
                f"| {'; '.join(kept)} |"
            )
        lines.append("")
    return "\n".join(lines)


def draw(cells: dict[Cell, dict[str, list[dict[str, str]]]], path: Path) -> None:
    """Distance of each arm and the mean of each criterion, one panel per cell."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = 3
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for axes, ((teacher, depth), criteria) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, cells.items(), strict=False
    ):
        names = sorted(criteria, key=lambda name: -mean(column(criteria[name], DISTANCE)))
        for row, name in enumerate(names):
            values = column(criteria[name], DISTANCE, 1000)
            color = "#c2410c" if name == "global" else "#475569"
            axes.plot(values, [row] * len(values), "o", color=color, alpha=0.45, markersize=5)
            axes.plot(mean(values), row, "|", color=color, markersize=15, markeredgewidth=2.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{teacher}, {depth} blocks", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        low, high = axes.get_xlim()
        if high > 2.5 * low:
            axes.set_xscale("log")
            ticks = [t * 10.0**e for e in range(-1, 3) for t in (1, 1.5, 2, 3, 5, 7)]
            axes.set_xticks([t for t in ticks if low <= t <= high], minor=False)
            axes.set_xticks([], minor=True)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in list(figure.axes)[len(cells) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "distance to the teacher after 100 steps of recovery, x 1000 (dots: seeds, bars: means)",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    folder = parser.parse_args().folder
    arms = read_arms(sorted(folder.glob("table3*.csv")))
    steps = "recover.fit.trainer.max_steps"
    hundred = group(arm for arm in arms if arm.get(steps) in (None, "", "100"))
    (folder / "summary.md").write_text(to_markdown(hundred))
    draw(hundred, folder / "criteria.png")


if __name__ == "__main__":
    main()
