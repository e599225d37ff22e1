"""Compares two runs as text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
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

WITHOUT_PROTOCOL = ("depth", "width", "num_params")  # properties of the model itself


def compare_runs(run_dir_a: str | Path, run_dir_b: str | Path) -> str:
    """A plain-text table of the metrics of two runs, and whether their protocols are equal.

    The table shows the difference B - A only for equal protocols. It names the entries in which the
    protocols differ.

    Args:
        run_dir_a: Folder with ``metrics.json`` (an evaluation) or ``measure.json``
            (``task=measure``).
        run_dir_b: The folder to compare with.

    Raises:
        ArtifactError: if a folder is not a run folder or was not evaluated, or a file is broken.
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
            f"{folder} has no {METRICS}: it was not evaluated. Rerun the same command to finish "
            "the run, then compare."
        )
    return metrics


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[str, str]] | None:
    """Protocol entries that differ, by path, with both values; None without protocols."""
    ours, theirs = (dict(_entries(side.get("protocol") or {})) for side in (a, b))
    if not ours and not theirs:
        return None
    differing = [
        key
        for key in {**ours, **theirs}
        if not (key in ours and key in theirs and ours[key] == theirs[key])
    ]
    return {key: (_shown(ours, key), _shown(theirs, key)) for key in differing}


def _shown(entries: dict[str, Any], key: str) -> str:
    return json.dumps(entries[key]) if key in entries else "(not given)"


def _entries(protocol: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in protocol.items():
        if isinstance(entry, dict) and entry:
            yield from _entries(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def _protocol_lines(differing: dict[str, tuple[str, str]] | None) -> list[str]:
    if differing is None:
        return [
            "Protocol: unknown, neither run records it. The values may not be comparable, so no "
            "differences are shown."
        ]
    if not differing:
        return ["Protocol: equal. The values are comparable."]
    rows: list[tuple[str, ...]] = [("", "A", "B")]
    rows += [(f"  {key}", *values) for key, values in differing.items()]
    return [
        f"Protocol: DIFFERS in {', '.join(differing)}. The values are NOT comparable, so no "
        "differences are shown.",
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
    measured = [peak for peak in memory if peak is not None]
    if measured:
        cells = ["—" if peak is None else f"{peak:,.0f} MiB" for peak in memory]
        change = f"{measured[1] - measured[0]:+,.0f} MiB" if len(measured) == 2 else ""
        rows.append(("peak memory", *cells, change))
    return rows


def _section(
    a: dict[str, Any],
    b: dict[str, Any],
    section: str,
    name: Callable[[str], str],
    form: Callable[[float], str],
) -> list[tuple[str, ...]]:
    ours, theirs = numbers(a.get(section)), numbers(b.get(section))
    rows: list[tuple[str, ...]] = []
    if ours or theirs:
        rows.append(({"speedup": "speed-up", "seconds": "time"}[section],))
    for key in {**ours, **theirs}:
        cells = [form(side[key]) if key in side else "—" for side in (ours, theirs)]
        change = theirs[key] - ours[key] if key in ours and key in theirs else None
        sign = "" if change is None else "-" if change < 0 else "+"
        rows.append((f"  {name(key)}", *cells, "" if change is None else sign + form(abs(change))))
    return rows


def _grid(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned lines: the first column flush left, the others flush right."""
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
