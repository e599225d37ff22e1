"""Two runs beside each other, as text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.report.outside import printable
from tinyfusion_pl.report.reading import (
    MEASURED,
    METRICS,
    models_in,
    numbers,
    read_metrics,
    read_run,
)
from tinyfusion_pl.report.words import difference, duration, label, metric_keys, stage_label, value

WITHOUT_PROTOCOL = ("depth", "width", "num_params")  # what a model is, however it was measured


def compare_runs(run_dir_a: str | Path, run_dir_b: str | Path) -> str:
    """A plain-text table of two runs' metrics, and whether their protocols are equal, entry by entry.

    Only then is there a difference, B - A, of what was measured: figures of unequal or unknown protocols stand side by side without one.

    Args:
        run_dir_a, run_dir_b: Folders with ``metrics.json`` (an evaluation) or ``measure.json`` (``task=measure``).

    Raises:
        ArtifactError: a folder is no run folder, or has not been evaluated, or the file is broken.
    """
    folders = [Path(run_dir_a), Path(run_dir_b)]
    a, b = (_measured(folder) for folder in folders)
    names = [
        printable(metrics.get("name") or folder.resolve().name)
        for folder, metrics in zip(folders, (a, b))
    ]
    differing = _differing(a, b)
    lines = [
        f"A  {printable(folders[0])}  ({names[0]})",
        f"B  {printable(folders[1])}  ({names[1]})",
        "",
        *_protocol_lines(differing),
        "",
    ]
    return (
        "\n".join(
            lines + _grid([("", "A", "B", "B - A"), *_rows(a, b, comparable=differing == {})])
        )
        + "\n"
    )


def _measured(folder: Path) -> dict[str, Any]:
    if (folder / MEASURED).exists() and not (folder / METRICS).exists():
        return read_metrics(folder / MEASURED)
    metrics = read_run(folder).metrics
    if metrics is None:
        raise ArtifactError(
            f"{folder} has no {METRICS}: it was not evaluated. Finish the run (the same command goes on), then compare."
        )
    return metrics


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[str, str]] | None:
    """Path of an entry of the protocols -> what it is in either, where that is not the same; None where there are none."""
    ours, theirs = (dict(_entries(side.get("protocol") or {})) for side in (a, b))
    if not ours and not theirs:
        return None
    differing = [
        key
        for key in {**ours, **theirs}
        if not (key in ours and key in theirs and ours[key] == theirs[key])
    ]
    return {
        key: tuple(
            json.dumps(side[key]) if key in side else "(not given)" for side in (ours, theirs)
        )
        for key in differing
    }


def _entries(protocol: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in protocol.items():
        if isinstance(entry, dict) and entry:
            yield from _entries(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def _protocol_lines(differing: dict[str, tuple[str, str]] | None) -> list[str]:
    if differing is None:
        return [
            "Protocol: unknown, neither run says how it was measured. The figures may not be comparable. No differences are given."
        ]
    if not differing:
        return ["Protocol: equal. The figures are comparable."]
    rows = [("", "A", "B"), *((f"  {key}", *values) for key, values in differing.items())]
    return [
        f"Protocol: DIFFERS in {', '.join(differing)}. The figures are NOT comparable. No differences are given.",
        *_grid(rows),
    ]


def _rows(a: dict[str, Any], b: dict[str, Any], *, comparable: bool) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for model in dict.fromkeys([*models_in(a), *models_in(b)]):
        ours, theirs = numbers(a.get(model)), numbers(b.get(model))
        keys = metric_keys(ours, theirs)
        rows += [(model,)] * bool(keys)
        for key in keys:
            both = key in ours and key in theirs and (comparable or key in WITHOUT_PROTOCOL)
            change = difference(key, ours[key], theirs[key]) if both else ""
            rows.append(
                (f"  {label(key)}", value(key, ours.get(key)), value(key, theirs.get(key)), change)
            )
    rows += _section(a, b, "speedup", lambda key: f"{key}", lambda number: f"{number:.2f}x")
    rows += _section(a, b, "seconds", stage_label, duration)
    memory = [numbers(metrics).get("peak_memory_mib") for metrics in (a, b)]
    if any(peak is not None for peak in memory):
        change = f"{memory[1] - memory[0]:+,.0f} MiB" if None not in memory else ""
        rows.append(
            (
                "peak memory",
                *("—" if peak is None else f"{peak:,.0f} MiB" for peak in memory),
                change,
            )
        )
    return rows


def _section(a: dict, b: dict, section: str, name: Any, form: Any) -> list[tuple[str, ...]]:
    ours, theirs = numbers(a.get(section)), numbers(b.get(section))
    rows = [({"speedup": "speed-up", "seconds": "time"}[section],)] if ours or theirs else []
    for key in {**ours, **theirs}:
        cells = [form(side[key]) if key in side else "—" for side in (ours, theirs)]
        change = theirs[key] - ours[key] if key in ours and key in theirs else None
        sign = "" if change is None else "-" if change < 0 else "+"
        rows.append((f"  {name(key)}", *cells, "" if change is None else sign + form(abs(change))))
    return rows


def _grid(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of text as aligned lines: the first column left, the others right."""
    widths = [
        max(len(row[column]) for row in rows if column < len(row))
        for column in range(max(map(len, rows)))
    ]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(widths[0]) if column == 0 else cell.rjust(widths[column] + 3)
            for column, cell in enumerate(row)
        ]
        lines.append("".join(cells).rstrip())
    return lines
