"""Lightning's rich progress bar, counting steps in training and images in sampling."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.text import Text


class StepProgressBar(RichProgressBar):
    """Counts optimizer steps if ``max_steps`` ends the fit; hides epochs and logger version."""

    @property
    def total_train_batches(self) -> int | float:
        """``max_steps`` if that ends the fit, else the number of batches of an epoch."""
        return self.trainer.max_steps if self._counts_steps else super().total_train_batches

    @property
    def _counts_steps(self) -> bool:
        return self.trainer.max_epochs == -1 and self.trainer.max_steps > 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar to the current step or batch."""
        index = trainer.global_step - 1 if self._counts_steps else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, index)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics of the progress bar without the logger version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class SamplingProgressBar(RichProgressBar):
    """Shows batches, elapsed and remaining time, and images/s of all devices.

    For `Generation` and `Extraction`.
    """

    @property
    def test_description(self) -> str:
        """What the module does, such as "Sampling"."""
        return self._description

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read description and batch size from the module, then start the bar."""
        self._description = getattr(pl_module, "what_it_does", "Sampling")
        self._images_per_batch = getattr(pl_module, "batch_size", 1) * trainer.world_size
        super().on_test_start(trainer, pl_module)

    def configure_columns(self, trainer: Trainer) -> list:
        """Lightning's columns, with the speed in images/s."""
        return [
            _ImagesPerSecond(self._images_per_batch, style=column.style)
            if isinstance(column, ProcessingSpeedColumn)
            else column
            for column in super().configure_columns(trainer)
        ]


class _ImagesPerSecond(ProcessingSpeedColumn):
    def __init__(self, images_per_batch: int, *, style: Any) -> None:
        super().__init__(style)
        self.images_per_batch = images_per_batch

    def render(self, task: Any) -> Text:
        # rich has no speed after a single batch.
        speed = task.speed or task.completed / max(task.elapsed or 0, 1e-3)
        return Text(f"{speed * self.images_per_batch:.3g} images/s", style=self.style)
