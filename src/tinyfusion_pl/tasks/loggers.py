"""The logs of a stage: one row per step, without gaps or duplicates after an interruption."""

from __future__ import annotations

import csv
import io
import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tinyfusion_pl.artifacts import atomic_path, write_text
from tinyfusion_pl.checksums import content_sha256
from tinyfusion_pl.tasks.folder import say

# Entry of a checkpoint: name of a log -> checksum of its rows up to the checkpoint's step.
LOGS = "logs_sha256"


class StepLogger(Logger):
    """Writes ``metrics.csv`` with one row a step, and ``hparams.yaml``.

    Each row is in the file as soon as it is logged. What is logged at the step of the last row
    joins that row, whoever logs it; so a resumed fit may log a step again.

    Args:
        folder: Where the files go; an existing ``metrics.csv`` is continued.
    """

    name = version = ""
    logs_once = True  # what is logged again at a step does not count twice

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.path = Path(folder), Path(folder) / "metrics.csv"
        self._hyperparams: dict[str, Any] = {}
        self._columns: list[str] | None = None  # None: the file has not been read yet

    @property
    def save_dir(self) -> str:
        """The folder of the files."""
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """The folder of the files."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write `metrics` to the row of `step`; None: the last one."""
        if self._columns is None:
            self._open()
        step = int(self._last.get("step", 0) if step is None else step)
        row = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in metrics.items()
        }
        row["step"] = step
        joins = bool(self._last) and int(self._last["step"]) == step
        if joins:
            row = self._last | row
        start = self._start if joins else self._end
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite(row, joins=joins)
        elif len(line := self._line([row.get(name) for name in self._columns])) < self._end - start:
            self._rewrite(row, joins=joins)
        else:
            with self.path.open("r+b", buffering=0) as file:  # a single write: nothing is torn
                file.seek(start)
                file.write(line)
            self._last, self._start, self._end = row, start, start + len(line)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Add `params` to ``hparams.yaml``."""
        self._hyperparams.update(vars(params) if isinstance(params, Namespace) else params or {})
        with atomic_path(self.folder / "hparams.yaml") as temporary:
            save_hparams_to_yaml(temporary, self._hyperparams)

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget what was logged after `step`."""
        drop_lines_after(self.path, step, step_of=_csv_step)
        self._columns = None

    def _open(self) -> None:
        """Find the columns and the last complete row; rewrite a file without a header."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if not lines or not lines[0].startswith(b"step") or not lines[0].endswith(b"\n"):
            write_text(self.path, "step\n")
            lines = [b"step\n"]
        if not lines[-1].endswith(b"\n"):  # torn
            os.truncate(self.path, sum(map(len, lines[:-1])))
            lines.pop()
        self._columns, *rows = csv.reader(
            line.decode(errors="replace") for line in [lines[0], *lines[1:][-1:]]
        )
        self._end = sum(map(len, lines))
        self._start = self._end - (len(lines[-1]) if rows else 0)
        self._last = (
            {name: cell for name, cell in zip(self._columns, rows[-1]) if cell} if rows else {}
        )

    def _rewrite(self, row: dict[str, Any], *, joins: bool) -> None:
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
        rows = rows[:-1] if joins else rows
        cells = ([each.get(name) for name in self._columns] for each in [*rows, row])
        write_text(self.path, b"".join(map(self._line, [self._columns, *cells])).decode())
        self._open()

    @staticmethod
    def _line(cells: list[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()


class LogsFollowSteps(Callback):
    """A resumed fit continues its logs where its checkpoint was made.

    What the interrupted attempt logged after that is dropped from `StepLogger`s and from
    `decisions`, a file with a line of JSON a step. What belongs to a checkpoint's own step is
    logged
    before the checkpoint is written: Lightning does it after that, where a kill would lose it. The
    checkpoint holds checksums of the logs up to there, and it is reported where they do not match.
    """

    def __init__(self, decisions: Path) -> None:
        self.decisions = decisions
        self._expected: dict[str, str] = {}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the checksums of the logs."""
        self._expected = dict(checkpoint.get(LOGS) or {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what was logged after the checkpoint, and compare the checksums."""
        if not trainer.is_global_zero:
            return
        step, expected = trainer.global_step, self._expected
        for path, read in self._logs(trainer).items():
            drop_lines_after(path, step, step_of=read)
            if expected.get(path.name, found := log_sha256(path, step)) != found:
                say(
                    f"{path} is {'changed or damaged' if path.exists() else 'missing'} since the "
                    f"checkpoint of step {step} was written: the curves in the report may be wrong"
                )
        for logger in _step_loggers(trainer):
            logger.drop_after(step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Log the metrics of this step, and save the checksums of the logs."""
        step, metrics, every = (
            trainer.global_step,
            dict(trainer.logged_metrics),
            trainer.log_every_n_steps,
        )
        if every and step % every == 0 and int(metrics.pop("step", -1)) == step:
            for logger in trainer.loggers:
                if getattr(logger, "logs_once", False):
                    logger.log_metrics(metrics, step=step)
        if trainer.is_global_zero:
            checkpoint[LOGS] = {path.name: log_sha256(path, step) for path in self._logs(trainer)}

    def _logs(self, trainer: Trainer) -> dict[Path, Callable[[str], int | None]]:
        """Log file -> what gives the step of one of its lines."""
        return {
            self.decisions: _json_step,
            **{logger.path: _csv_step for logger in _step_loggers(trainer)},
        }


def _step_loggers(trainer: Trainer) -> list[StepLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, StepLogger)]


def drop_lines_after(path: Path, step: int, *, step_of: Callable[[str], int | None]) -> None:
    """Rewrite the log at `path` without torn lines and those of steps after `step`.

    Of several lines of the same step the last stays. `step_of` gives a line's step, 0 for a header,
    None for a line that cannot be read.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept: dict[int, str] = {}
    header = ""
    for i, line in enumerate(text.splitlines(keepends=True)):
        at = step_of(line) if line.endswith("\n") else None
        if i == 0 and line.startswith("step") and line.endswith("\n"):
            header = line
        elif at is not None and at <= step:
            kept[at] = line
    if (remaining := header + "".join(kept.values())).encode() != path.read_bytes():
        write_text(path, remaining)


def log_sha256(path: Path, step: int) -> str:
    """Checksum of the rows of the log at `path` before `step`, which are final."""
    if not path.exists():
        return content_sha256([])
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        if path.suffix == ".csv":  # a column that comes later leaves empty cells in earlier rows
            rows = [
                {str(name): cell for name, cell in row.items() if cell}
                for row in csv.DictReader(file)
            ]
            return content_sha256(
                [
                    row
                    for row in rows
                    if (at := _csv_step(str(row.get("step")))) is not None and at < step
                ]
            )
        return content_sha256(
            [line for line in file if (at := _json_step(line)) is not None and at < step]
        )


def _json_step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _csv_step(line: str) -> int | None:
    try:
        return int(line.partition(",")[0])
    except ValueError:
        return None


def csv_logger(*, folder: Path, stage: str) -> Logger:
    """Create the logger of a stage, which writes ``metrics.csv``; a resumed stage appends to it."""
    return StepLogger(folder)
