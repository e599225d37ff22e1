"""The table of a sweep as Markdown, CSV and HTML, with the common protocol above it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinyfusion_pl.artifacts import write_text
from tinyfusion_pl.report.arms import Arm, Row, Take, cell, get_columns, get_rows, read_arms
from tinyfusion_pl.report.markup import code, table
from tinyfusion_pl.report.outside import Html, html
from tinyfusion_pl.report.reading import numbers
from tinyfusion_pl.report.style import CSS
from tinyfusion_pl.report.sweep_figures import write_speedup

FILES = ("table.md", "table.csv", "table.html")
SPEEDUP = "speedup.png"  # only if speed was measured


def compare_sweep(folder: str | Path) -> str:
    """Write the table of a sweep into its folder, and return it as Markdown.

    Arms that differ only in the seed share a row with mean and standard deviation. Rows with the
    same teacher and depth are adjacent, the best first. The CSV has a line for each arm.

    Args:
        folder: Folder of the sweep.

    Raises:
        ArtifactError: if `folder` is not that of a sweep, or a file in it is broken.
    """
    folder = Path(folder)
    arms = read_arms(folder)
    rows, shared = get_rows(arms)
    columns = get_columns(rows)
    about = _about(arms, shared)
    markdown = _markdown(folder.resolve().name, rows, columns, about)
    write_text(folder / "table.md", markdown)
    write_text(folder / "table.csv", _csv(arms, columns))
    write_text(folder / "table.html", _page(folder.resolve().name, rows, columns, about))
    files = [*FILES]
    if points := _speedups(rows):
        write_speedup(folder / SPEEDUP, points)
        files.append(SPEEDUP)
    return f"{markdown}\nWrote {', '.join(files)} to {folder}\n"


def _speedups(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(name, depth compression, measured speed-up) of each row with timings."""
    points = []
    for row in rows:
        compression = row.mean(partial(_take_speedup, "ideal"))
        speed = row.mean(partial(_take_speedup, "measured"))
        if math.isfinite(compression) and math.isfinite(speed):
            points.append((" ".join(row.settings.values()), compression, speed))
    return points


def _take_speedup(key: str, arm: Arm) -> float | None:
    return numbers(arm.metrics.get("speedup")).get(key)


def _about(arms: Sequence[Arm], shared: dict[str, str]) -> dict[str, str]:
    """What all rows share: settings, seeds and protocol entries."""
    seeds = sorted({arm.seed for arm in arms if arm.seed is not None})
    about = {
        "settings": ", ".join(f"{name}={each}" for name, each in shared.items()) or "none",
        "seeds": ", ".join(seeds) or "the default",
    }
    protocols = [
        {k: v for k, v in (arm.metrics.get("protocol") or {}).items() if k != "seed"}
        for arm in arms
        if arm.metrics
    ]
    if protocols:
        common = {k: v for k, v in protocols[0].items() if all(p.get(k) == v for p in protocols)}
        about["protocol"] = json.dumps(common)
        if different := sorted({k for p in protocols for k in p if k not in common}):
            about["NOT comparable"] = f"the rows differ in {', '.join(different)}"
    return about


def _lines(
    rows: Sequence[Row], columns: Sequence[tuple[str, str, Take]]
) -> tuple[list[str], list[list[str]]]:
    names = list(rows[0].settings)
    header = [*names, "seeds", "kept blocks", *(heading for heading, _, _ in columns)]
    lines = []
    for row in rows:
        done = sum(arm.is_done for arm in row.arms)
        seeds = str(done) if done == len(row.arms) else f"{done} of {len(row.arms)}"
        failed = "; ".join(f"failed: {error}" for error in dict.fromkeys(row.errors))
        kept = ". ".join(filter(None, [row.kept, failed])) or ("" if done else "not finished")
        # No averages with failed arms: the others would not be a fair sample.
        measured = ["nan" if row.errors else cell(row, key, take) for _, key, take in columns]
        lines.append([*row.settings.values(), seeds, kept, *measured])
    return header, lines


def _markdown(
    name: str, rows: Sequence[Row], columns: Sequence[tuple[str, str, Take]], about: dict[str, str]
) -> str:
    header, lines = _lines(rows, columns)
    escaped = [
        [each.replace("|", "\\|").replace("\n", " ") for each in line] for line in [header, *lines]
    ]
    table_ = [f"| {' | '.join(line)} |" for line in escaped]
    rule = "|" + "|".join(["---"] * len(header)) + "|"
    notes = [f"- {key}: {text}" for key, text in about.items()]
    return "\n".join([f"# {name}", "", *notes, "", table_[0], rule, *table_[1:], ""])


def _csv(arms: Sequence[Arm], columns: Sequence[tuple[str, str, Take]]) -> str:
    names = list(dict.fromkeys(name for arm in arms for name in arm.settings))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [*names, "seed", "kept_blocks", "error", *(heading for heading, _, _ in columns)]
    )
    for arm in arms:
        measured = [take(arm) for _, _, take in columns]
        writer.writerow(
            [
                *(arm.settings.get(name, "") for name in names),
                arm.seed or "",
                json.dumps(arm.kept) if arm.kept else "",
                arm.error or "",
                *("" if each is None else repr(each) for each in measured),
            ]
        )
    return out.getvalue()


def _page(
    name: str, rows: Sequence[Row], columns: Sequence[tuple[str, str, Take]], about: dict[str, Any]
) -> str:
    header, lines = _lines(rows, columns)
    first = len(rows[0].settings) + 2
    notes = Html("").join(
        html("<p><strong>{}</strong>: {}</p>", key, code(text) if key == "protocol" else text)
        for key, text in about.items()
    )
    body = table(header, lines, numeric=range(first, len(header)))
    note = (
        "Mean and standard deviation over seeds. Rows with the same teacher and depth are "
        "adjacent, the best first."
    )
    return html(_PAGE, name=name, css=Html(CSS), notes=notes, table=body, note=note)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{css}
body {{ max-width: 110rem; }}</style>
</head>
<body>
<h1>{name}</h1>
{notes}
<p class="soft">{note}</p>
{table}
</body>
</html>
"""
