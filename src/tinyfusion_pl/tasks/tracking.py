"""Trackers, which show a run in W&B or TensorBoard in addition to its files."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError, read_json, write_json
from tinyfusion_pl.tasks.loggers import StepLogger
from tinyfusion_pl.tasks.outcomes import Outcome, get_outcome

LAST_FITS = ("recover", "train")
"""Stages whose ``val/*`` metrics have no prefix: of the model that a run ends with."""


class Tracker(ABC):
    """Creates the logger of each stage, and shows the outcome of finished stages.

    A run is one run of the tracker. Metrics of a stage have its name before theirs
    (``recover/train/loss``), but for ``val/*`` of `LAST_FITS`, which sweeps optimize.
    """

    kind: str
    """Name of the tracker in files."""

    @abstractmethod
    def __call__(self, *, folder: Path, stage: str) -> Logger:
        """The logger of `stage`, whose files are in `folder`, ``logs/<stage>`` of a run folder."""

    @abstractmethod
    def show(self, run_dir: Path, stage: str, outcome: Outcome) -> None:
        """Show what a finished stage left."""

    def check(self) -> None:
        """Raise a ValueError where it cannot log, before anything is trained."""
        return

    def finish(self, exit_code: int) -> None:
        """End the tracker's run; `exit_code` is 0 for a finished one."""
        return

    def marks(self, run_dir: Path) -> Marks:
        """What the tracker's run has of the run in `run_dir`."""
        return Marks(run_dir / "logs" / f"{self.kind}.json")

    @rank_zero_only
    def stage_ended(self, run_dir: Path, stage: str) -> None:
        """Show the outcome of the finished `stage`, unless the tracker's run has it."""
        logger = self(folder=run_dir / "logs" / stage, stage=stage)
        if isinstance(logger, OncePerStep):
            logger.catch_up()
        outcome = get_outcome(run_dir, stage)
        if outcome is not None and self.marks(run_dir).get(stage) != outcome.sha256:
            self.show(run_dir, stage, outcome)
            self.marks(run_dir).set(stage, outcome.sha256)


class Marks:
    """``logs/<tracker>.json``: the id of the tracker's run, and what it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = read_json(path) if path.exists() else {}
        except ArtifactError:
            content = {}  # logged again
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}

    def get(self, name: str) -> Any:
        """The entry `name`, or None."""
        return self.content.get(name)

    def set(self, name: str, value: Any) -> None:
        """Set the entry `name` and write the file."""
        self.content[name] = value
        write_json(self.path, self.content)

    def belong_to(self, run_id: str) -> None:
        """Forget what another run of the tracker has."""
        if self.content.get("id") != run_id:
            self.content = {}
            self.set("id", run_id)


class OncePerStep:
    """Mixin of a logger that logs each metric of a step once, despite interruptions.

    A tracker cannot drop what an interrupted attempt logged after its last checkpoint, so the steps
    that ``metrics.csv`` has are not logged again. A run of the tracker that has none of them, as
    that of another sweep, gets them first.
    """

    logs_once = True

    def follow(self, csv_path: Path, stage: str, marks: Callable[[], Marks]) -> None:
        """Read which steps were logged before; `marks` gives those of the tracker's open run."""
        self.stage, self._marks, self._rows = stage, marks, _read_rows(csv_path)
        self._logged = {step: set(row) for step, row in self._rows.items()}
        self._is_new = True

    def catch_up(self) -> None:
        """Log the steps that the tracker's run does not have yet."""
        if self._rows and not self._marks().get(f"{self.stage}/metrics"):
            self.begin()

    def begin(self) -> None:
        """Before the first metric is logged."""
        if not self._is_new:
            return
        self._is_new = False
        marks, name = self._marks(), f"{self.stage}/metrics"
        if not marks.get(name):
            for step, row in self._rows.items():
                self.log_named(row, step)
            marks.set(name, True)

    def log_once(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Log those of `metrics` that were not logged at `step`."""
        self.begin()
        before = set() if step is None else self._logged.setdefault(int(step), set())
        new = {
            name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            for name, value in metrics.items()
            if name not in before and name != "epoch"  # a fit is a single one
        }
        before.update(new)
        if new:
            self.log_named(new, step)

    def log_named(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Log `metrics` under the names that the tracker has for them."""
        raise NotImplementedError


def _read_rows(path: Path) -> dict[int, dict[str, float]]:
    """Step -> what a ``metrics.csv`` has of it; lines that cannot be read are left out."""
    if not path.exists():
        return {}
    rows: dict[int, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row.pop("step"))
                rows[step] = {
                    str(name): float(cell) for name, cell in row.items() if cell and name != "epoch"
                }
            except (KeyError, TypeError, ValueError):
                continue
    return rows


def named(metric: str, stage: str) -> str:
    """The name of a stage's metric in a tracker."""
    return metric if stage in LAST_FITS and metric.startswith("val/") else f"{stage}/{metric}"


def stage_loggers(factory: Callable[..., Logger] | None, folder: Path, stage: str) -> list[Logger]:
    """The logger that `factory` makes, and csv files, which the report reads."""
    if factory is None:
        return []
    made = factory(folder=folder, stage=stage)
    return [made] if isinstance(made, StepLogger) else [StepLogger(folder), made]


def check_logger(factory: Callable[..., Logger] | None) -> None:
    """Raise a ValueError where a tracker cannot log."""
    if isinstance(factory, Tracker):
        factory.check()


@contextmanager
def tracked(factory: Callable[..., Logger] | None) -> Iterator[Callable[[Path, str], None]]:
    """The tracker's run ends with the block, as failed where the block raises.

    Gives what is called with run folder and stage when a stage has ended.
    """
    tracker = factory if isinstance(factory, Tracker) else None
    exit_code = 0
    try:
        yield (lambda run_dir, stage: None) if tracker is None else tracker.stage_ended
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        exit_code = 255 if interrupted else getattr(error, "exit_code", 1)
        raise
    finally:
        if tracker is not None:
            tracker.finish(exit_code)
