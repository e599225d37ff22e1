"""The arms of a sweep as rows of settings and results, averaged over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tinyfusion_pl.artifacts import ArtifactError, read_json
from tinyfusion_pl.report.outside import printable, printable_content
from tinyfusion_pl.report.reading import METRICS, RECORD, SELECTION, numbers, read_metrics
from tinyfusion_pl.report.words import METRICS as MEASURED
from tinyfusion_pl.report.words import get_student, label, value

SETTINGS = "settings.json"  # written by an arm that only states its settings
ARMS = "arms"  # folder inside that of a sweep, with a file for each arm


class NothingMeasuredError(ArtifactError):
    """The folder has no results to compare."""


@dataclass(frozen=True)
class Arm:
    """One run of a sweep.

    Attributes:
        settings: Settings of the arm by name, without the seed.
        seed: The seed; None if the sweep did not set it.
        metrics: Content of ``metrics.json``; empty if the arm failed or is unfinished.
        kept: Kept blocks by stack path.
        choice: Content of ``selection.json``; empty without a criterion.
        error: Why the arm failed; None if it did not.
        is_stated: Whether the arm has stated its settings and has nothing else to do.
    """

    settings: dict[str, str]
    seed: str | None
    metrics: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    is_stated: bool = False

    @property
    def is_done(self) -> bool:
        """Whether the arm has results, or has stated its settings."""
        return bool(self.metrics) or self.is_stated

    @property
    def student(self) -> dict[str, float]:
        """Measurements of the arm's final model."""
        role = get_student(self.metrics)
        return numbers(self.metrics.get(role)) if role else {}


def read_arms(folder: str | Path) -> list[Arm]:
    """The arms of the sweep in `folder`, sorted by file name.

    Raises:
        NothingMeasuredError: if there are no arms, or none has ended.
        ArtifactError: if a file is broken.
    """
    files = sorted((Path(folder) / ARMS).glob("*.json"))
    if not files:
        raise NothingMeasuredError(
            f"{folder} is not the folder of a sweep: it has no {ARMS}/*.json. Give the output "
            "folder of a multirun (-m), such as runs/table3."
        )
    arms = [_read_arm(file) for file in files]
    if not any(arm.is_done or arm.error for arm in arms):
        raise NothingMeasuredError(
            f"No arm of {folder} has been evaluated. Finish the sweep (rerun the same command to "
            "resume it), then compare."
        )
    return arms


def _read_arm(file: Path) -> Arm:
    content = printable_content(read_json(file))
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("settings"), dict)
        or "run_dir" not in content
    ):
        raise ArtifactError(
            f"{file} is not the record of an arm: expected an object with 'settings' and "
            "'run_dir'. Delete it and rerun the sweep."
        )
    settings = {key: str(each) for key, each in content["settings"].items()}
    seed, run_dir = settings.pop("seed", None), file.parent.parent / content["run_dir"]
    metrics = read_metrics(run_dir / METRICS) if (run_dir / METRICS).exists() else {}
    stacks = read_json(run_dir / RECORD).get("stacks", {}) if (run_dir / RECORD).exists() else {}
    choice = read_json(run_dir / SELECTION) if (run_dir / SELECTION).exists() else {}
    stated = (
        printable_content(read_json(run_dir / SETTINGS)) if (run_dir / SETTINGS).exists() else {}
    )
    settings |= {key: "" if each is None else str(each) for key, each in stated.items()}
    return Arm(
        settings,
        seed,
        metrics,
        {printable(p): s["kept_blocks"] for p, s in stacks.items()},
        choice,
        content.get("error"),
        is_stated=bool(stated),
    )


# -- rows
@dataclass(frozen=True)
class Row:
    """Arms with equal settings, one for each seed."""

    settings: dict[str, str]
    arms: list[Arm]

    @property
    def errors(self) -> list[str]:
        """The errors of failed arms."""
        return [arm.error for arm in self.arms if arm.error]

    def values(self, take: Callable[[Arm], float | None]) -> list[float]:
        """The values of the arms that have one."""
        return [each for arm in self.arms if (each := take(arm)) is not None]

    def mean(self, take: Callable[[Arm], float | None]) -> float:
        """The mean of the values; NaN if there are none."""
        values = self.values(take)
        return statistics.fmean(values) if values else math.nan

    @property
    def kept(self) -> str:
        """The kept blocks; if seeds differ, the most frequent choice and how many seeds made it."""
        shown = [_blocks(arm.kept) for arm in self.arms if arm.kept]
        if not shown:
            return ""
        most = statistics.mode(shown)
        return (
            most if len(set(shown)) == 1 else f"{most} ({shown.count(most)} of {len(shown)} seeds)"
        )


def _blocks(kept: dict[str, list[int]]) -> str:
    if len(kept) == 1:
        return " ".join(map(str, *kept.values()))
    return "; ".join(f"{path}: {' '.join(map(str, blocks))}" for path, blocks in kept.items())


def get_rows(arms: Sequence[Arm]) -> tuple[list[Row], dict[str, str]]:
    """Rows by the settings that differ, and the settings that all arms share.

    Rows with the same teacher and depth are adjacent, the best first: by FID, or else by distance
    to the teacher.
    """
    names = list(dict.fromkeys(name for arm in arms for name in arm.settings))
    shared = {
        name: arms[0].settings[name]
        for name in names
        if all(arm.settings.get(name) == arms[0].settings.get(name) for arm in arms)
    }
    rows: dict[str, Row] = {}
    for arm in arms:
        own = {name: arm.settings.get(name, "") for name in names if name not in shared}
        rows.setdefault(json.dumps(own), Row(own, [])).arms.append(arm)
    return sorted(rows.values(), key=_sort_key), shared


def _sort_key(row: Row) -> tuple:
    done = next((arm for arm in row.arms if arm.metrics), None)
    if done is None:
        return (1, "", 0, math.inf)
    teacher = str((done.metrics.get("teacher") or {}).get("weights_sha256"))
    quality = row.mean(lambda arm: arm.student.get("fid", arm.student.get("teacher_distance")))
    return (0, teacher, -done.student.get("depth", 0), math.inf if math.isnan(quality) else quality)


# -- columns
Take = Callable[[Arm], "float | None"]


def get_columns(rows: Sequence[Row]) -> list[tuple[str, str, Take]]:
    """(heading, key for the format, function that takes the value) of columns with any value."""
    return [column for column in _columns(rows) if any(row.values(column[2]) for row in rows)]


def _columns(rows: Sequence[Row]) -> Iterator[tuple[str, str, Take]]:
    yield label("depth"), "depth", lambda arm: arm.student.get("depth")
    yield label("num_params"), "num_params", lambda arm: arm.student.get("num_params")
    yield (
        "choice (block runs)",
        "block_runs",
        lambda arm: numbers(arm.metrics.get("block_runs")).get("learn_mask"),
    )
    yield (
        "recovery (block runs)",
        "block_runs",
        lambda arm: numbers(arm.metrics.get("block_runs")).get("recover"),
    )
    yield "recovery, share of the teacher's training", "share", _share_of_training
    for key in ("calibration_loss", "teacher_distance", "fid"):
        yield f"{label(key)}, pruned", key, partial(_take_pruned, key)
    measured = dict.fromkeys(key for row in rows for arm in row.arms for key in arm.student)
    for key in [
        *(key for key in MEASURED if key in measured),
        *(key for key in measured if key not in MEASURED),
    ]:
        same_width = (
            key == "width"
            and len({arm.student[key] for row in rows for arm in row.arms if key in arm.student})
            == 1
        )
        if key not in ("depth", "num_params") and not same_width:
            yield label(key), key, partial(_take_student, key)
    yield "speed-up", "speedup", lambda arm: numbers(arm.metrics.get("speedup")).get("measured")


def _share_of_training(arm: Arm) -> float | None:
    """Number of recovery images relative to those that the teacher was trained on."""
    images = numbers(arm.metrics.get("training_images"))
    return (
        images["recover"] / images["teacher"]
        if images.get("teacher") and "recover" in images
        else None
    )


def _take_student(key: str, arm: Arm) -> float | None:
    return arm.student.get(key)


def _take_pruned(key: str, arm: Arm) -> float | None:
    """The value before recovery; None if there was no recovery."""
    if get_student(arm.metrics) == "pruned":
        return None
    return numbers(arm.metrics.get("pruned")).get(key)


def cell(row: Row, key: str, take: Take) -> str:
    """The mean and, if seeds differ, the standard deviation: ``3.52 ± 0.08``."""
    values = row.values(take)
    if not values:
        return ""
    mean = statistics.fmean(values)
    text = value(key, round(mean) if all(isinstance(each, int) for each in values) else mean)
    if len(values) < 2 or max(values) == min(values) or not math.isfinite(mean):
        return text
    spread = statistics.stdev(values)
    return (
        f"{text} ± {100 * spread:.1f}"
        if key == "accuracy"
        else f"{text} ± {value(key, float(f'{spread:.2g}'))}"
    )
