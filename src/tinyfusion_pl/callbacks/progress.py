"""Lightning's rich progress bar for trainings that count steps and for sampling, which counts images."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.text import Text


class StepProgressBar(RichProgressBar):
    """The rich bar without epochs and logger version, which say nothing where a fit is a number of steps: it counts these, not batches."""

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self._counts_steps else super().total_train_batches

    @property
    def _counts_steps(self) -> bool:
        return self.trainer.max_epochs == -1 and self.trainer.max_steps > 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(
            trainer,
            pl_module,
            outputs,
            batch,
            trainer.global_step - 1 if self._counts_steps else batch_idx,
        )

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class SamplingProgressBar(RichProgressBar):
    """The rich bar for `Generation` and `Extraction`: batches, time gone and left, and images/s of all devices together."""

    @property
    def test_description(self) -> str:
        return self._description

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._description = getattr(pl_module, "what_it_does", "Sampling")
        self._images_a_batch = getattr(pl_module, "batch_size", 1) * trainer.world_size
        super().on_test_start(trainer, pl_module)

    def configure_columns(self, trainer: Trainer) -> list:
        return [
            _ImagesPerSecond(self._images_a_batch, style=column.style)
            if isinstance(column, ProcessingSpeedColumn)
            else column
            for column in super().configure_columns(trainer)
        ]


class _ImagesPerSecond(ProcessingSpeedColumn):
    def __init__(self, images_a_batch: int, *, style: Any) -> None:
        super().__init__(style)
        self.images_a_batch = images_a_batch

    def render(self, task: Any) -> Text:
        speed = task.speed or task.completed / max(
            task.elapsed or 0, 1e-3
        )  # a single batch has no speed of its own
        return Text(f"{speed * self.images_a_batch:.3g} images/s", style=self.style)
