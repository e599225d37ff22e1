"""TensorBoard: event files below ``tensorboard/`` of the run folder, a folder for each stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.tensorboard import _TENSORBOARD_AVAILABLE
from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.tasks.outcomes import Outcome
from tinyfusion_pl.tasks.tracking import OncePerStep, Tracker


class TensorBoardTracker(Tracker):
    """Scalars of each stage, then the final figures, images and the table of metrics.

    ``tensorboard --logdir runs/NAME`` shows all runs of an experiment beside each other. Metrics
    keep
    their names: TensorBoard shows the folder of the stage beside them.
    """

    kind = "tensorboard"

    def check(self) -> None:
        """Raise a ValueError if the package tensorboard is missing."""
        if not _TENSORBOARD_AVAILABLE:
            raise ValueError(
                "logger=tensorboard needs the package tensorboard, which is not installed. Install "
                "the extra: pip install 'tinyfusion_pl[tensorboard]'."
            )

    def __call__(self, *, folder: Path, stage: str) -> Logger:
        """The logger of `stage`."""
        return _StageLogger(self, Path(folder), stage)

    def show(self, run_dir: Path, stage: str, outcome: Outcome) -> None:
        """Write final metrics, table and figures as event files."""
        from torchvision.io import read_image

        writer = self(folder=run_dir / "logs" / stage, stage=stage).experiment
        for name, value in outcome.final.items():
            writer.add_scalar(name, value)
        for name, content in outcome.config.items():
            writer.add_text(name, str(content))
        if outcome.table is not None:
            columns, rows = outcome.table
            lines = [columns, ["---"] * len(columns), *rows]
            writer.add_text(
                "final/metrics", "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
            )
        for name, file in outcome.draw(run_dir).items():
            writer.add_image(f"final/{name}", read_image(str(file)))
        writer.close()


class _StageLogger(OncePerStep, TensorBoardLogger):
    """Lightning's TensorBoard logger, of one stage."""

    def __init__(self, tracker: TensorBoardTracker, folder: Path, stage: str) -> None:
        run_dir = folder.parents[1]
        super().__init__(run_dir / tracker.kind, name=stage, version="", default_hp_metric=False)
        self.follow(folder / "metrics.csv", stage, lambda: tracker.marks(run_dir))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.log_once(metrics, step)

    def log_named(self, metrics: Mapping[str, Any], step: int | None) -> None:
        TensorBoardLogger.log_metrics(self, metrics, step)
