"""Callbacks that make a fit resumable: checkpoints at step boundaries, and no early end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from tinyfusion_pl.tasks.interruption import end_if_asked


class UnfinishedError(RuntimeError):
    """Training stopped before its last step: it neither finished nor failed."""

    exit_code = 3  # of the command


class FullLength(Callback):
    """Raises `UnfinishedError` if training ends before `num_steps`, ahead of all other callbacks.

    A time limit (``max_time``, Lightning's `Timer`) applies to each attempt, so that each one
    progresses.

    Args:
        stage: Name of the stage.
        num_steps: Its optimizer steps.
    """

    def __init__(self, stage: str, num_steps: int) -> None:
        self.stage, self.num_steps = stage, num_steps

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restart the timers."""
        for timer in _timers(trainer):
            checkpoint["callbacks"].pop(timer.state_key, None)  # the time of earlier attempts

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise unless all steps are done."""
        if (step := trainer.global_step) < self.num_steps:
            used_up = any((timer.time_remaining() or 1) <= 0 for timer in _timers(trainer))
            why = " when its max_time was reached" if used_up else ""
            raise UnfinishedError(
                f"{self.stage} stopped at step {step} of {self.num_steps}{why}. It is not "
                "finished, so later stages were skipped. Rerun the same command to resume."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise also if the fit had no batch at all: then training never ends."""
        self.on_train_end(trainer, pl_module)


def _timers(trainer: Trainer) -> list[Timer]:
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009  (set by a connector)
    return [callback for callback in callbacks if isinstance(callback, Timer)]


class WholeSteps(Callback):
    """Resuming on a different number of devices starts at a step boundary.

    Lightning steps after every accumulate_grad_batches-th batch, and counts the batches of the
    previous attempt, whose size was different.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round the count of batches down to whole steps."""
        seen: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if rest := seen.processed % trainer.accumulate_grad_batches:
            for count in ("ready", "started", "processed", "completed"):
                setattr(seen, count, getattr(seen, count) - rest)


class SaveAtEnd(Callback):
    """Checkpoints the last step, before weight averaging replaces the raw weights.

    Args:
        path: File of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint."""
        trainer.save_checkpoint(self.path)


class StepCheckpoint(ModelCheckpoint):
    """Checkpoints at step boundaries: every few optimizer steps, and before a requested stop.

    Accumulated gradients are not part of a checkpoint, so one within a step would lose its batches.
    A request to stop also waits for the end of the step. `SaveAtEnd` saves the last step.

    Args:
        path: File of the checkpoint.
        every_n_steps: Optimizer steps between checkpoints.
    """

    def __init__(self, path: Path, *, every_n_steps: int) -> None:
        super().__init__(
            dirpath=path.parent,
            filename=path.stem,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.path, self._stopping = path, False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a step has ended and a checkpoint is due, or the fit is to stop."""
        self._stopping = self._stopping or trainer.should_stop
        trainer.should_stop = self._stopping and trainer.global_step > self._step_before
        if trainer.global_step == self._step_before or trainer.global_step >= trainer.max_steps:
            return
        end_if_asked(trainer, self.path)
        if trainer.should_stop:
            trainer.save_checkpoint(self.path)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
