"""Two runs beside each other, as text for a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyfusion_pl.artifacts import ArtifactError

from .reading import METRICS, Run, models_in, numbers, read_run
from .words import difference, duration, label, metric_keys, stage_label, value


def compare(run_dir_a: str | Path, run_dir_b: str | Path) -> str:
    """A plain-text table of two runs' metrics and their differences, B - A, and whether their protocols are equal.

    Raises:
        ArtifactError: a folder is no run folder, or has not been evaluated (no `metrics.json`), or the file is broken.
    """
    a, b = (_measured(folder) for folder in (run_dir_a, run_dir_b))
    lines = [f"A  {a.folder}  ({a.name})", f"B  {b.folder}  ({b.name})", "", *_protocol_lines(a.metrics, b.metrics), ""]
    return "\n".join(lines + _grid([("", "A", "B", "B - A"), *_rows(a.metrics, b.metrics)])) + "\n"


def _measured(folder: str | Path) -> Run:
    run = read_run(folder)
    if run.metrics is None:
        raise ArtifactError(
            f"{folder} has no {METRICS}: it was not evaluated. Finish the run (the same command goes on), then compare."
        )
    return run


def _protocol_lines(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    ours, theirs = a.get("protocol") or {}, b.get("protocol") or {}
    if not ours and not theirs:
        return ["Protocol: unknown, neither run says how it was measured. The figures may not be comparable."]
    keys = [key for key in {**ours, **theirs} if not (key in ours and key in theirs and ours[key] == theirs[key])]
    if not keys:
        return ["Protocol: equal. The figures are comparable."]
    rows = [("", "A", "B"), *((f"  {key}", _setting(ours, key), _setting(theirs, key)) for key in keys)]
    return [f"Protocol: DIFFERS in {', '.join(keys)}. The figures are NOT comparable.", *_grid(rows)]


def _setting(protocol: dict[str, Any], key: str) -> str:
    return json.dumps(protocol[key]) if key in protocol else "(not given)"


def _rows(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for model in dict.fromkeys([*models_in(a), *models_in(b)]):
        ours, theirs = numbers(a.get(model)), numbers(b.get(model))
        keys = metric_keys(ours, theirs)
        rows += [(model,)] * bool(keys)
        for key in keys:
            both = key in ours and key in theirs
            change = difference(key, ours[key], theirs[key]) if both else ""
            rows.append((f"  {label(key)}", value(key, ours.get(key)), value(key, theirs.get(key)), change))
    rows += _section(a, b, "speedup", lambda key: f"{key}", lambda number: f"{number:.2f}x")
    rows += _section(a, b, "seconds", stage_label, duration)
    memory = [numbers(metrics).get("peak_memory_mib") for metrics in (a, b)]
    if any(peak is not None for peak in memory):
        change = f"{memory[1] - memory[0]:+,.0f} MiB" if None not in memory else ""
        rows.append(("peak memory", *("—" if peak is None else f"{peak:,.0f} MiB" for peak in memory), change))
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
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(widths[0]) if column == 0 else cell.rjust(widths[column] + 3) for column, cell in enumerate(row)
        ]
        lines.append("".join(cells).rstrip())
    return lines
