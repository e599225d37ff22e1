"""One resumable fit: the Trainer of a stage, which resumes from the stage's last checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from tinyfusion_pl.callbacks import Clock
from tinyfusion_pl.checksums import Origin
from tinyfusion_pl.data import GenerationDataModule
from tinyfusion_pl.modules import Denoising
from tinyfusion_pl.tasks.budget import Budget
from tinyfusion_pl.tasks.checkpoint_io import WholeCheckpointIO
from tinyfusion_pl.tasks.folder import RunFolder, say
from tinyfusion_pl.tasks.interruption import interruptible
from tinyfusion_pl.tasks.loggers import LogsFollowSteps
from tinyfusion_pl.tasks.steps import FullLength, SaveAtEnd, StepCheckpoint, WholeSteps
from tinyfusion_pl.tasks.tracking import check_logger, stage_loggers
from tinyfusion_pl.tasks.trainer_checks import (
    check_length,
    check_optimizer,
    check_sharded,
    check_trainer,
)


@dataclass(kw_only=True)
class Fit:
    """The training of a stage.

    Args:
        trainer: Factory of the Trainer, called with callbacks, logger and default_root_dir.
        callbacks: Name -> additional callback; None disables one.
        logger: Factory of a logger, called with ``folder=`` and ``stage=`` (`csv_logger`,
            `WandbTracker`, `TensorBoardTracker`); csv files are written as well. None: no logging.
        checkpoint_every_n_steps: Optimizer steps between checkpoints: a killed process loses at
        most
            these.
        budget: Length and batch size. Its batch size overrides the data module's; the Trainer's
            max_steps, unless it is -1, overrides its length. None: the Trainer's max_steps and the
            data module's batch size.
        compile: Whether to compile each block. The first steps then take minutes; pays off on GPUs.
    """

    trainer: Callable[..., Trainer]
    callbacks: Mapping[str, Callback | None] = field(default_factory=dict)
    logger: Callable[..., Logger] | None = None
    checkpoint_every_n_steps: int = 50
    budget: Budget | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self.callbacks = {
            name: each for name, each in (self.callbacks or {}).items() if each is not None
        }

    def check(self, stage: str, module: Denoising) -> Trainer:
        """Build the Trainer, which is returned, and the optimizer of `module` once.

        Finds invalid settings before anything is trained.

        Raises:
            ValueError: if the number of steps is missing, the budget's batch cannot be divided, or
            a
                setting would stop the training before its last step or disable checkpoints; and for
                whatever Trainer, optimizer and scheduler reject.
        """
        for name, each in self.callbacks.items():
            if not isinstance(each, Callback):
                raise ValueError(
                    f"{stage}.fit.callbacks.{name} is {each!r}; give a Lightning callback, or null "
                    "to disable it."
                )
        every = self.checkpoint_every_n_steps
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"{stage}.fit.checkpoint_every_n_steps is {every!r}; give a count >= 1."
            )
        check_logger(self.logger)
        probe = check_trainer(stage, self.trainer, self.callbacks)
        shares = self._shares(stage, probe)
        num_steps = self._num_steps(stage, probe)
        check_length(
            stage,
            probe,
            num_steps=num_steps,
            accumulate=shares[1] if shares else probe.accumulate_grad_batches,
        )
        check_optimizer(stage, module, num_steps=num_steps)
        check_sharded(stage, probe, self.callbacks, module)
        if self.compile and isinstance(probe.strategy, ModelParallelStrategy):
            raise ValueError(
                f"{stage}.fit.compile is True, but FSDP2 gathers the weights of a block inside the "
                "call to be compiled. Set it to false, or use trainer=ddp."
            )
        return probe

    def _num_steps(self, stage: str, trainer: Trainer) -> int:
        if trainer.max_steps >= 1:
            return trainer.max_steps
        if self.budget is None or trainer.max_steps != -1:
            raise ValueError(
                f"{stage}.fit.trainer.max_steps is {trainer.max_steps}; give a number of optimizer "
                "steps >= 1, or a budget."
            )
        return self.budget.num_steps

    def _shares(self, stage: str, trainer: Trainer) -> tuple[int, int] | None:
        if self.budget is None:
            return None
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"{stage}.fit.trainer.accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}, but the budget computes it from "
                "global_batch_size. Leave it at 1 and set budget.max_device_batch_size."
            )
        return self.budget.divide(num_processes(trainer))

    def check_weights(self, stage: str, weights: str) -> None:
        """Raise a ValueError unless the checkpoints have `weights`, ``"ema"`` or ``"raw"``."""
        if weights not in ("ema", "raw"):
            raise ValueError(f"{stage}.weights is {weights!r}; give 'ema' or 'raw'.")
        if weights == "ema" and not any(
            isinstance(callback, WeightAveraging) for callback in self.callbacks.values()
        ):
            raise ValueError(
                f"{stage}.weights is 'ema', but no callback in {stage}.fit.callbacks averages "
                f"weights. Set {stage}.weights=raw, or callbacks@{stage}.fit.callbacks=ema."
            )

    def num_steps(self, stage: str) -> int:
        """The number of optimizer steps."""
        return self._num_steps(stage, self._bare_trainer())

    def num_images(self, stage: str, data: GenerationDataModule) -> int:
        """The number of images of all steps, devices and accumulated batches."""
        probe = self._bare_trainer()
        size = data.batch_size * probe.accumulate_grad_batches * num_processes(probe)
        return self._num_steps(stage, probe) * (
            size if self.budget is None else self.budget.global_batch_size
        )

    def num_processes(self) -> int:
        """The number of processes that train."""
        return num_processes(self._bare_trainer())

    def device(self) -> torch.device:
        """The device of the first process."""
        return self._bare_trainer().strategy.root_device

    def _bare_trainer(self) -> Trainer:
        return self.trainer(callbacks=list(self.callbacks.values()), logger=False)

    def run(
        self,
        stage: str,
        folder: RunFolder,
        module: Denoising,
        data: GenerationDataModule,
        *,
        first: Sequence[Callback] = (),
        made_from: Origin | None = None,
    ) -> float:
        """Fit `module` on `data`, resuming from the stage's last checkpoint if there is one.

        Args:
            stage: Name of the stage.
            folder: The run.
            module: The module to fit.
            data: Its data.
            first: Callbacks that must precede all others of the stage.
            made_from: Origin of the training; a checkpoint of another origin raises an error.

        Returns:
            The seconds of training.

        Raises:
            UnfinishedError: if training stopped before its last step, for example by ``max_time``.
            Preempted: after a signal; the checkpoint contains the step that was being trained.
        """
        clock = Clock()
        checkpoint = folder.checkpoint(stage)
        probe = self._bare_trainer()
        settings: dict[str, Any] = {"max_steps": (steps := self._num_steps(stage, probe))}
        if self.budget is not None:
            shares = self._shares(stage, probe)
            assert shares is not None
            data.batch_size, accumulated = shares
            settings["accumulate_grad_batches"] = accumulated
            length = (
                f"{steps:,} steps"
                if steps == self.budget.num_steps
                else f"max_steps={steps} overrides the budget ({self.budget.num_steps:,} steps)"
            )
            say(
                f"{stage}: {length}; global batch {self.budget.global_batch_size} = "
                f"{data.batch_size} per device x {_count(num_processes(probe), 'device')} x "
                f"{_count(accumulated, 'accumulation step')}"
            )
        trainer = self.trainer(
            # Copies: the state of a callback must not outlive this Trainer and its models.
            callbacks=[
                FullLength(stage, steps),
                LogsFollowSteps(folder / stage / "decisions.jsonl"),
                *first,
                WholeSteps(),
                SaveAtEnd(checkpoint),
                *copy.deepcopy(list(self.callbacks.values())),
                clock,
                StepCheckpoint(checkpoint, every_n_steps=self.checkpoint_every_n_steps),
            ],
            default_root_dir=folder / stage,
            logger=stage_loggers(self.logger, folder / "logs" / stage, stage),
            **settings,
        )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO(made_from)
        with interruptible(trainer, at_steps=True), _compiled(module, self.compile):
            trainer.fit(
                module,
                datamodule=data,
                ckpt_path=checkpoint if checkpoint.exists() else None,
                weights_only=True,
            )
        data.trainer = None
        return clock.seconds


@contextmanager
def _compiled(module: Denoising, compiles: bool) -> Iterator[None]:
    module.compiles = compiles
    try:
        yield
    finally:
        if compiles:
            module.uncompile()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def num_processes(trainer: Trainer) -> int:
    """The number of processes of `trainer`, before it launches them."""
    return trainer.num_nodes * trainer.num_devices
