"""The callbacks that make a fit resumable: checkpoints at step boundaries, and no end before its last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from tinyfusion_pl.tasks.interruption import end_if_asked


class Unfinished(RuntimeError):
    """A training stopped before its last step: an outcome of its own, neither finished nor failed."""

    exit_code = 3  # of the command


class FullLength(Callback):
    """Raises `Unfinished` where training ends before `num_steps`, before any other callback takes it for finished.

    A limit of time (``max_time``, Lightning's `Timer`) holds for each attempt, so that each gets further.
    """

    def __init__(self, stage: str, num_steps: int) -> None:
        self.stage, self.num_steps = stage, num_steps

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for timer in _timers(trainer):
            checkpoint["callbacks"].pop(timer.state_key, None)  # the time of earlier attempts

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (step := trainer.global_step) < self.num_steps:
            used_up = any((timer.time_remaining() or 1) <= 0 for timer in _timers(trainer))
            why = " when its max_time was reached" if used_up else ""
            raise Unfinished(
                f"{self.stage} stopped at step {step} of {self.num_steps}{why}. It is not finished, so later "
                "stages do not run. Rerun the same command to resume."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_end(trainer, pl_module)  # a fit without a single batch ends no training


def _timers(trainer: Trainer) -> list[Timer]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Timer)]


class WholeSteps(Callback):
    """Resuming on a different number of devices starts at a step boundary.

    Lightning steps after every accumulate_grad_batches-th batch, counting those of the attempt before, which were of another size.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen = trainer.fit_loop.epoch_loop.batch_progress.current
        if rest := seen.processed % trainer.accumulate_grad_batches:
            for count in ("ready", "started", "processed", "completed"):
                setattr(seen, count, getattr(seen, count) - rest)


class SaveAtEnd(Callback):
    """Checkpoint the last step, before a weight averaging callback writes averaged weights over the raw ones."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class StepCheckpoint(ModelCheckpoint):
    """Checkpoints `path` every so many optimizer steps, and when the Trainer or a signal says to stop: only where a step has ended.

    Accumulated gradients are in no checkpoint, so one within a step would lose its batches. A request
    to stop waits for the step's end as well. The last step's checkpoint is `SaveAtEnd`'s.
    """

    def __init__(self, path: Path, *, every_n_steps: int) -> None:
        super().__init__(
            dirpath=path.parent, filename=path.stem, every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False, enable_version_counter=False,
        )  # fmt: skip
        self.path, self._stopping = path, False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stopping = self._stopping or trainer.should_stop
        trainer.should_stop = self._stopping and trainer.global_step > self._step_before
        if trainer.global_step == self._step_before or trainer.global_step >= trainer.max_steps:
            return
        end_if_asked(trainer, self.path)
        if trainer.should_stop:
            trainer.save_checkpoint(self.path)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
