"""Weights & Biases: one W&B run a run, with all its stages, its final figures and its models."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from tinyfusion_pl.tasks.outcomes import Outcome
from tinyfusion_pl.tasks.tracking import LAST_FITS, Marks, OncePerStep, Tracker, named

if TYPE_CHECKING:
    from wandb import Run

SWEEP_ID, RUN_ID = (
    "WANDB_SWEEP_ID",
    "WANDB_RUN_ID",
)  # which `wandb agent` sets for an arm of its sweep
LOG_IN = "Log in with 'wandb login', or set logger.factory.offline=true and run 'wandb sync' later."
_opened: set[str] = set()  # ids of the W&B runs that this process opened
_ended: set[str] = set()  # and ended


class WandbTracker(Tracker):
    """One W&B run for one run folder, whichever of its stages a command runs.

    The stages share a W&B run because a sweep optimizes one figure of one run. Each stage has a
    step metric of its own (``recover/step``), so that no step is dropped where the next stage
    starts at 1. The run's id is in ``logs/wandb.json``: a resumed command resumes the W&B run.
    Under `wandb agent` the id is the agent's.

    Args:
        project: W&B project.
        experiment: Name of the experiment: the group, and with the run folder's name the run's
        name.
        offline: Only write files below ``wandb/`` of the run folder, for `wandb sync`.
        log_models: Also upload the shallow and the recovered model as artifacts.
        entity: W&B user or team; None: the account's default.
        tags: Tags of the W&B run.
        notes: Text about the W&B run.
    """

    kind = "wandb"

    def __init__(
        self,
        *,
        project: str,
        experiment: str,
        offline: bool = False,
        log_models: bool = False,
        entity: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
    ) -> None:
        self.project, self.experiment, self.offline = project, experiment, offline
        self.log_models, self.entity, self.tags, self.notes = log_models, entity, tags, notes

    def check(self) -> None:
        """Raise a ValueError if there is no W&B account to log to."""
        import wandb  # takes seconds, and only this logger needs it

        if (
            wandb.run is not None or self.offline or (sys.stdin and sys.stdin.isatty())
        ):  # there W&B asks
            return
        if wandb.setup().settings.mode not in ("online", "run", "shared"):
            return
        try:
            is_known = wandb.login(prompt=False)
        except TypeError:  # W&B before that argument
            return
        except Exception as error:
            raise ValueError(
                f"logger=wandb: W&B does not accept the account: {error}. {LOG_IN}"
            ) from error
        if not is_known:
            raise ValueError(
                "logger=wandb needs a W&B account, and there is no API key on this machine. "
                f"{LOG_IN}"
            )

    def __call__(self, *, folder: Path, stage: str) -> Logger:
        """The logger of `stage`."""
        return _StageLogger(self, Path(folder), stage)

    def marks(self, run_dir: Path) -> Marks:
        """What the open W&B run has of the run in `run_dir`."""
        marks, wandb = super().marks(run_dir), sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            marks.belong_to(wandb.run.id)
        elif SWEEP_ID in os.environ and (run_id := os.environ.get(RUN_ID)):
            marks.belong_to(run_id)
        return marks

    def open(self, run_dir: Path) -> Run:
        """The W&B run of the run in `run_dir`; one that a script opened itself is used as it is."""
        import wandb

        if wandb.run is not None:
            return wandb.run
        run_dir.mkdir(parents=True, exist_ok=True)
        in_sweep = SWEEP_ID in os.environ  # whose agent says project and id
        file = run_dir / "config.yaml"
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        try:
            run = wandb.init(
                project=None if in_sweep else self.project,
                entity=None if in_sweep else self.entity,
                id=None if in_sweep else self.marks(run_dir).get("id"),
                name=self.get_run_name(run_dir),
                group=self.experiment,
                dir=run_dir,
                resume="allow",
                mode="offline" if self.offline else None,
                config={**config, "run_dir": str(run_dir.resolve())},
                tags=self.tags,
                notes=self.notes,
            )
        except wandb.Error as error:
            raise ValueError(f"logger=wandb: W&B did not start a run: {error}. {LOG_IN}") from error
        _opened.add(run.id)
        self.marks(run_dir)  # keeps the id
        return run

    def get_run_name(self, run_dir: Path) -> str:
        """The name of the run in `run_dir` in W&B."""
        return f"{self.experiment}-{run_dir.resolve().name}"

    def show(self, run_dir: Path, stage: str, outcome: Outcome) -> None:
        """Log final metrics, table, figures and models."""
        import wandb

        run = self.open(run_dir)
        run.config.update(outcome.config, allow_val_change=True)
        shown: dict[str, Any] = dict(outcome.final)
        if outcome.table is not None:
            columns, rows = outcome.table
            shown["final/metrics"] = wandb.Table(columns=columns, data=rows)
        for name, file in outcome.draw(run_dir).items():
            shown[f"final/{name}"] = wandb.Image(str(file))
        if shown:
            run.log(shown)
        if self.log_models:
            for name, folder in outcome.models.items():
                artifact = wandb.Artifact(f"{self.get_run_name(run_dir)}-{name}", type="model")
                artifact.add_dir(str(folder))
                run.log_artifact(artifact)

    @rank_zero_only
    def finish(self, exit_code: int) -> None:
        """End the W&B run that this process opened."""
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and wandb.run.id in _opened:
            _opened.discard(wandb.run.id)
            _ended.add(wandb.run.id)
            wandb.run.finish(exit_code=exit_code)

    @rank_zero_only
    def fail(self, run_dir: Path, error: str) -> None:
        """Record the error of an arm of a W&B sweep that failed before it logged anything."""
        if os.environ.get(RUN_ID) in _ended:
            return  # it did log, and is marked as failed
        run = self.open(run_dir)
        run.summary["error"] = error
        self.finish(1)


class _StageLogger(OncePerStep, WandbLogger):
    """Lightning's W&B logger, of one stage in the W&B run of all of them."""

    def __init__(self, tracker: WandbTracker, folder: Path, stage: str) -> None:
        super().__init__(project=tracker.project, save_dir=folder.parents[1])
        self.tracker, self.run_dir = tracker, folder.parents[1]
        self.follow(folder / "metrics.csv", stage, lambda: tracker.marks(self.run_dir))

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        if self._experiment is None:
            self._experiment = run = self.tracker.open(self.run_dir)
            step = f"{self.stage}/step"
            run.define_metric(step, hidden=True)
            run.define_metric(f"{self.stage}/*", step_metric=step)
            if self.stage in LAST_FITS:
                run.define_metric("val/*", step_metric=step)
        return self._experiment

    @rank_zero_only
    def begin(self) -> None:
        _ = self.experiment  # only an open run has marks
        super().begin()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.log_once(metrics, step)

    def log_named(self, metrics: Mapping[str, Any], step: int | None) -> None:
        at = {} if step is None else {f"{self.stage}/step": int(step)}
        self.experiment.log(
            {named(name, self.stage): value for name, value in metrics.items()} | at
        )

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        given = vars(params) if isinstance(params, Namespace) else params or {}
        super().log_hyperparams(
            {named(str(name), self.stage): value for name, value in given.items()}
        )
