"""A run folder as arrays and dictionaries: everything that the page, the figures and the comparison draw from.

A run may have been killed and resumed at any point. So a step may be written twice (the later line wins), a line may be torn (it is skipped
and counted), and whole parts may not exist yet (they read as empty).
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion_pl.artifacts import ArtifactError, load_tensors, read_json

MODELS = ("teacher", "pruned", "recovered")
STAGES = ("learn_mask", "recover", "evaluate")

METRICS, CONFIG, SAMPLES = "metrics.json", "config.yaml", "samples.safetensors"
DECISIONS, RECORD, LOGS = "learn_mask/decisions.jsonl", "shallow/record.json", "logs"


@dataclass(frozen=True)
class StackHistory:
    """What the gates of one stack decided, at T recorded steps for B blocks."""

    steps: np.ndarray  # (T,) int, ascending
    kept: np.ndarray  # (T, B) bool
    probabilities: np.ndarray  # (T, B), probability that the block stays
    confidence: np.ndarray  # (T, B), probability of the most probable candidate of the block's group
    groups: tuple[dict[str, Any], ...]  # of the last step: start, num_kept, num_blocks, confidence, entropy

    @property
    def num_blocks(self) -> int:
        return self.kept.shape[1]

    @property
    def settled_at(self) -> int:
        """The recorded step since which the decision has not changed."""
        changed = np.flatnonzero((self.kept[1:] != self.kept[:-1]).any(axis=1))
        return int(self.steps[changed[-1] + 1] if len(changed) else self.steps[0])


Curves = dict[str, tuple[np.ndarray, np.ndarray]]
"""Column name -> (steps, values), both (T,), steps ascending."""


@dataclass(frozen=True)
class Run:
    """The readable content of a run folder; a part that is not there is None or empty."""

    folder: Path
    metrics: dict[str, Any] | None
    stacks: dict[str, StackHistory]
    num_torn_lines: int
    curves: dict[str, Curves]  # by stage
    samples: dict[str, np.ndarray] | None  # labels (N,), each model's pictures (N, C, H, W) uint8
    record: dict[str, Any] | None
    config: str | None

    @property
    def name(self) -> str:
        return str((self.metrics or {}).get("name") or self.folder.resolve().name)


def read_run(folder: str | Path) -> Run:
    """Read what a run folder holds so far.

    Raises:
        ArtifactError: the folder is missing or holds nothing of a run, or a file in it is broken (the text names it).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder. Give the run folder of a finished or interrupted run, such as runs/<experiment>/<hash>."
        )
    parts = (METRICS, CONFIG, SAMPLES, DECISIONS, RECORD, LOGS)
    if not any((folder / part).exists() for part in parts):
        raise ArtifactError(
            f"{folder} is not a run folder: it holds none of {', '.join(parts)}. Give the folder that a run wrote."
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
        record=optional(RECORD, _read_object),
        config=optional(CONFIG, lambda path: path.read_text(encoding="utf-8", errors="replace")),
    )


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ArtifactError(
            f"{path} holds a {type(content).__name__}, expected a JSON object. Delete it and evaluate the run again."
        )
    return content


def read_metrics(path: Path) -> dict[str, Any]:
    """`metrics.json`, checked as far as the report relies on it: each known section, where present, is an object."""
    metrics = _read_object(path)
    for section in (*MODELS, "seconds", "speedup", "protocol"):
        if not isinstance(metrics.get(section, {}), dict):
            raise ArtifactError(
                f"{path}: {section!r} is {metrics[section]!r}, expected an object of names and values. Delete the file and evaluate the run again."
            )
    return metrics


def numbers(section: dict[str, Any] | None) -> dict[str, float]:
    """The numeric entries of a section, in its order: the ones that can stand in a table."""
    return {k: v for k, v in (section or {}).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def read_decisions(path: Path) -> tuple[dict[str, StackHistory], int]:
    """`decisions.jsonl` by stack path, and how many torn lines were skipped.

    A killed process tears its last line; where the resumed run appended to that, the torn line stands in the middle.
    """
    by_step: dict[int, dict] = {}
    num_torn = 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            num_torn += 1
            continue
        try:
            by_step[int(entry["step"])] = entry["stacks"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path}, line {number}: expected an object with 'step' and 'stacks', got {line[:80]!r}."
            ) from error
    if not by_step:
        return {}, num_torn
    steps = sorted(by_step)
    stacks = {}
    for stack in by_step[steps[-1]]:
        try:
            stacks[stack] = _history(steps, [by_step[step][stack] for step in steps])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(
                f"{path}: the entries of stack {stack!r} do not fit together ({type(error).__name__}: {error}). Each needs kept_blocks, "
                "block_probabilities of one length, and groups. Were two different runs written into one folder?"
            ) from error
    return stacks, num_torn


def _history(steps: list[int], entries: list[dict]) -> StackHistory:
    probabilities = np.array([entry["block_probabilities"] for entry in entries], dtype=float)  # (T, B)
    kept = np.zeros(probabilities.shape, dtype=bool)
    confidence = np.ones(probabilities.shape)  # a block outside all groups is not up for decision
    for row, entry in enumerate(entries):
        kept[row, entry["kept_blocks"]] = True
        for group in entry["groups"]:
            confidence[row, group["start"] : group["start"] + group["num_blocks"]] = group["confidence"]
    return StackHistory(np.array(steps), kept, probabilities, confidence, tuple(entries[-1]["groups"]))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key by which version_2 comes before version_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]


def read_curves(folder: Path) -> dict[str, Curves]:
    """The logged scalars of each stage, `logs/<stage>/**/metrics.csv`; known stages first. Of several files, the later version wins."""
    cells: dict[str, dict[str, dict[int, float]]] = {}
    for path in sorted(folder.glob("*/**/metrics.csv"), key=_natural):
        columns = cells.setdefault(path.relative_to(folder).parts[0], {})
        for name, column in _read_csv(path).items():
            columns.setdefault(name, {}).update(column)
    order = sorted(cells, key=lambda stage: (STAGES.index(stage) if stage in STAGES else len(STAGES), stage))
    return {stage: {name: _sorted(column) for name, column in cells[stage].items() if column} for stage in order}


def _sorted(column: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(column)
    return np.array(steps), np.array([column[step] for step in steps])


def _read_csv(path: Path) -> dict[str, dict[int, float]]:
    """Column name -> {step: value}. Empty and non-numeric cells are left out, so is a last line without its line end (a torn write)."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = csv.DictReader(lines)
    if lines and "step" not in (rows.fieldnames or ()):
        raise ArtifactError(
            f"{path} has the columns {rows.fieldnames}, expected a 'step' column as Lightning's CSVLogger writes it."
        )
    columns: dict[str, dict[int, float]] = {name: {} for name in rows.fieldnames or () if name != "step"}
    for row in rows:
        step = _number(row["step"])
        if step is None or not math.isfinite(step):
            continue
        for name, column in columns.items():
            if (value := _number(row[name])) is not None:
                column[int(step)] = value
    return columns


def _number(cell: str | None) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def read_samples(path: Path) -> dict[str, np.ndarray]:
    """`samples.safetensors`: `labels` (N,) and for some of the models uint8 pictures (N, C, H, W), C = 1 or 3, one noise and label a row."""
    tensors = {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
    samples = {name: tensors[name] for name in ("labels", *MODELS) if name in tensors}
    labels = samples.get("labels")
    if labels is None or labels.ndim != 1 or len(samples) < 2:
        raise ArtifactError(
            f"{path} holds {sorted(tensors)}, expected 'labels' (N,) and pictures of at least one of {', '.join(MODELS)}."
        )
    for name in samples.keys() - {"labels"}:
        pictures = samples[name]
        if (
            pictures.ndim != 4
            or len(pictures) != len(labels)
            or pictures.shape[1] not in (1, 3)
            or pictures.dtype != np.uint8
        ):
            raise ArtifactError(
                f"{path}: {name!r} is {pictures.dtype} {pictures.shape}, expected uint8 ({len(labels)}, 1 or 3, H, W): one picture for each label."
            )
    return samples
