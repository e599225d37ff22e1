"""The outcome of a finished stage, as a tracker shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyfusion_pl.artifacts import read_json
from tinyfusion_pl.checksums import content_sha256
from tinyfusion_pl.report import write_figures
from tinyfusion_pl.report.reading import METRICS, RECORD, models_in, numbers, read_metrics
from tinyfusion_pl.report.words import get_student, metric_keys

FINAL = "final"
RENAMED = {"num_params": "num_parameters"}
DISTANCES = ("fid", "fd_dinov2", "cmmd", "kid", "kid_mean")
"""Metrics that a sweep minimizes, the first of them that was measured."""
SHOWN = ("samples", "overview", "decisions", "block_probabilities", "scores")
"""Figures of the report that are shown; curves are the tracker's own."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage.

    Attributes:
        config: Further entries of the configuration: blocks kept, protocol.
        final: ``final/<name>`` -> a figure of the model that the run ends with.
        table: Column names and rows of the metrics of all models; None: none.
        has_figures: Whether the report's figures can be drawn.
        models: Name -> folder of a model that the stage left.
    """

    config: dict[str, Any] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    table: tuple[list[str], list[list[Any]]] | None = None
    has_figures: bool = False
    models: dict[str, Path] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Checksum of what is shown."""
        return content_sha256([self.config, self.final, self.table, sorted(self.models)])

    def draw(self, run_dir: Path) -> dict[str, Path]:
        """Name -> file of the report's figures, as far as they can be drawn."""
        return write_figures(run_dir, only=SHOWN) if self.has_figures else {}


def get_outcome(run_dir: Path, stage: str) -> Outcome | None:
    """What the finished `stage` left in `run_dir`; None where there is nothing to show."""
    if stage == "learn_mask" and (run_dir / RECORD).exists():
        stacks = read_json(run_dir / RECORD).get("stacks", {})
        kept = {path: stack["kept_blocks"] for path, stack in stacks.items()}
        return Outcome({"kept_blocks": kept}, models={"shallow": run_dir / "shallow"})
    if stage == "recover" and (run_dir / "recovered").exists():
        return Outcome(models={"recovered": run_dir / "recovered"})
    if stage == "evaluate" and (run_dir / METRICS).exists():
        metrics = read_metrics(run_dir / METRICS)
        config = {"protocol": metrics.get("protocol") or {}}
        return Outcome(config, get_final_metrics(metrics), get_table(metrics), has_figures=True)
    if stage == "train" and (record := run_dir / "trained" / "record.json").exists():
        content = read_json(record)
        final = _named(numbers(content.get("metrics")))
        config = {"protocol": content.get("protocol") or {}}
        return Outcome(config, final, models={"trained": run_dir / "trained"})
    return None


def get_final_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``final/<name>`` of the recovered model, or of the pruned one if there is no other."""
    if (role := get_student(metrics)) is None:
        return {}
    speedup = numbers(metrics.get("speedup"))
    names = {"measured": "speed_up", "ideal": "ideal_speed_up"}
    faster = {f"{FINAL}/{names[key]}": value for key, value in speedup.items() if key in names}
    return _named(numbers(metrics[role])) | faster


def get_objective(run_dir: Path) -> float | None:
    """What a sweep minimizes: the run's ``final/fid``, or the first of `DISTANCES` it has."""
    if not (run_dir / METRICS).exists():
        return None
    final = get_final_metrics(read_metrics(run_dir / METRICS))
    return next((final[key] for name in DISTANCES if (key := f"{FINAL}/{name}") in final), None)


def _named(section: Mapping[str, float]) -> dict[str, float]:
    return {f"{FINAL}/{RENAMED.get(name, name)}": value for name, value in section.items()}


def get_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The metrics of all models: column names, and a row for each model."""
    models = {name: numbers(metrics[name]) for name in models_in(metrics)}
    keys = metric_keys(*models.values())
    rows = [[name, *(section.get(key) for key in keys)] for name, section in models.items()]
    return ["model", *(RENAMED.get(key, key) for key in keys)], rows
