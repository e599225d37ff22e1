"""Reads a run folder into arrays and dictionaries for the page, the figures and the comparison.

A run may have been killed and resumed at any point. If a step was written twice, the later line
wins; torn lines are skipped and counted; parts that do not exist yet read as empty.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion_pl.artifacts import ArtifactError, load_tensors, read_json
from tinyfusion_pl.report.decisions import StackHistory, read_decisions, read_text, wrong_in
from tinyfusion_pl.report.outside import printable, printable_content, printable_lines

MODELS = ("teacher", "pruned", "recovered")
STAGES = ("learn_mask", "recover", "evaluate")

OTHER_SECTIONS = ("seconds", "speedup", "block_runs", "training_images", "shared", "protocol")
METRICS, CONFIG, SAMPLES = "metrics.json", "config.yaml", "samples.safetensors"
MEASURED = "measure.json"  # written by task=measure, in the format of METRICS
DECISIONS, RECORD, LOGS = "learn_mask/decisions.jsonl", "shallow/record.json", "logs"
SELECTION = "learn_mask/selection.json"  # written by a criterion instead of mask learning


Curves = dict[str, tuple[np.ndarray, np.ndarray]]
"""Column name -> (steps, values), both (T,), steps ascending."""


@dataclass(frozen=True)
class Run:
    """The content of a run folder. A missing part is None or empty."""

    folder: Path
    metrics: dict[str, Any] | None
    stacks: dict[str, StackHistory]
    num_torn_lines: int
    curves: dict[str, Curves]  # by stage
    samples: dict[str, np.ndarray] | None  # labels (N,), each model's images (N, C, H, W) uint8
    record: dict[str, Any] | None
    config: str | None
    selection: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The name in the metrics, or else that of the folder."""
        return printable((self.metrics or {}).get("name") or self.folder.resolve().name)


def read_run(folder: str | Path) -> Run:
    """Read the current content of a run folder.

    Raises:
        ArtifactError: if `folder` is missing or not a run folder, or a file in it is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder. Give the folder of a run, such as runs/<experiment>/<hash>."
        )
    parts = (METRICS, CONFIG, SAMPLES, DECISIONS, RECORD, LOGS)
    if not any((folder / part).exists() for part in parts):
        raise ArtifactError(
            f"{folder} is not a run folder: it has none of {', '.join(parts)}. Give the folder of "
            "a run, such as runs/<experiment>/<hash>."
        )

    def optional(part: str, read: Any) -> Any:
        return read(folder / part) if (folder / part).exists() else None

    stacks, num_torn_lines = optional(DECISIONS, read_decisions) or ({}, 0)
    return Run(
        folder=folder,
        metrics=optional(METRICS, read_metrics),
        stacks=stacks,
        num_torn_lines=num_torn_lines,
        curves=read_curves(folder / LOGS),
        samples=optional(SAMPLES, read_samples),
        record=optional(RECORD, read_record),
        selection=optional(SELECTION, _read_object),
        config=optional(CONFIG, lambda path: printable_lines(read_text(path))),
    )


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ArtifactError(
            f"{path} has a {type(content).__name__}, expected an object. Delete the file and rerun "
            "the same command."
        )
    return printable_content(content)


def read_metrics(path: Path) -> dict[str, Any]:
    """Read `metrics.json` and check that its known sections are objects."""
    metrics = _read_object(path)
    for section in (*MODELS, *OTHER_SECTIONS):
        if not isinstance(metrics.get(section, {}), dict):
            raise ArtifactError(
                f"{path}: {section!r} is {metrics[section]!r}, expected an object of names and "
                "values. Delete the file and rerun the evaluation."
            )
    return metrics


def read_record(path: Path) -> dict[str, Any]:
    """Read `record.json` of a shallow model and check its stacks."""
    record = _read_object(path)
    stacks = record.get("stacks", {})
    if not isinstance(stacks, dict) or not all(
        isinstance(stack, dict) and {"num_blocks", "kept_blocks"} <= stack.keys()
        for stack in stacks.values()
    ):
        raise ArtifactError(
            f"{path}: 'stacks' is {str(stacks)[:80]}, expected num_blocks and kept_blocks for each "
            "stack."
        )
    for name, stack in stacks.items():
        if wrong := wrong_in(stack):
            raise ArtifactError(
                f"{path}: '{wrong}' of stack {name} is {str(stack[wrong])[:80]}, which is invalid "
                f"for {str(stack['num_blocks'])[:80]} blocks. The file was edited or is damaged: "
                "copy the folder again."
            )
    return record


def numbers(section: dict[str, Any] | None) -> dict[str, float]:
    """The numeric entries of a section, in its order."""
    return {
        k: v
        for k, v in (section or {}).items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that orders version_2 before version_10."""
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.split(r"(\d+)", path.as_posix())
    ]


def read_curves(folder: Path) -> dict[str, Curves]:
    """The curves of each stage from `<stage>/**/metrics.csv`, known stages first.

    If several files have a step, the later file wins.
    """
    cells: dict[str, dict[str, dict[int, float]]] = {}
    for path in sorted(folder.glob("*/**/metrics.csv"), key=_natural):
        columns = cells.setdefault(printable(path.relative_to(folder).parts[0]), {})
        for name, column in _read_csv(path).items():
            columns.setdefault(name, {}).update(column)
    order = sorted(
        cells, key=lambda stage: (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)
    )
    return {
        stage: {name: _sorted(column) for name, column in cells[stage].items() if column}
        for stage in order
    }


def _sorted(column: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(column)
    return np.array(steps), np.array([column[step] for step in steps])


def _read_csv(path: Path) -> dict[str, dict[int, float]]:
    """Column name -> {step: value}; skips non-numeric cells and a torn last line."""
    lines = read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = csv.DictReader(lines)
    names = list(rows.fieldnames or ())
    if lines and "step" not in names:
        raise ArtifactError(
            f"{path} has columns {names}, expected a 'step' column as written by CSVLogger."
        )
    columns: dict[str, dict[int, float]] = {name: {} for name in names if name and name != "step"}
    for row in rows:
        step = _number(row["step"])
        if step is None or not math.isfinite(step):
            continue
        for name, column in columns.items():
            if (value := _number(row[name])) is not None:
                column[int(step)] = value
    return {printable(name): column for name, column in columns.items()}


def _number(cell: str | None) -> float | None:
    try:
        return None if cell is None else float(cell)
    except ValueError:
        return None


def models_in(section: dict[str, Any] | None) -> list[str]:
    """The models in `metrics.json` or in the samples: teacher, pruned, recovered, then others."""
    section = section or {}
    others = [
        name
        for name, content in section.items()
        if name not in (*MODELS, *OTHER_SECTIONS, "labels")
        and isinstance(content, (dict, np.ndarray))
    ]
    return [model for model in MODELS if model in section] + others


def read_samples(path: Path) -> dict[str, np.ndarray]:
    """Read `samples.safetensors`, where row i of all models has the same noise and label.

    Returns:
        `labels` (N,) and, for some of the models, uint8 images (N, C, H, W) with C = 1 or 3.
    """
    tensors = {printable(name): tensor.numpy() for name, tensor in load_tensors(path).items()}
    samples = {name: tensors[name] for name in ("labels", *models_in(tensors)) if name in tensors}
    labels = samples.get("labels")
    if labels is None or labels.ndim != 1 or len(samples) < 2 or not len(labels):
        wanted = f"'labels' (N,) and images of at least one of {', '.join(MODELS)}"
        raise ArtifactError(
            f"{path} has { {k: v.shape for k, v in tensors.items()} }, expected {wanted}."
        )
    for name in samples.keys() - {"labels"}:
        found = samples[name]
        if (
            found.ndim != 4
            or len(found) != len(labels)
            or found.shape[1] not in (1, 3)
            or found.dtype != np.uint8
        ):
            wanted = f"uint8 ({len(labels)}, 1 or 3, H, W), one image for each label"
            raise ArtifactError(
                f"{path}: {name!r} is {found.dtype} {found.shape}, expected {wanted}."
            )
    return samples
