"""Samples images in ``trainer.test`` and measures them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl.metrics import Features, GenerationMetrics
from tinyfusion_pl.objectives import ImageSampler


class Measured(Protocol):
    """Stores measured batches, so that an interrupted evaluation resumes after the last one."""

    def check(self) -> None:
        """Delete stored batches that cannot be used, in one process."""

    def indices(self) -> Tensor:
        """Numbers of the samples that are already measured."""

    def batches(self, *, rank: int, world_size: int) -> Iterable[tuple[Tensor, Tensor, Features]]:
        """(indices, labels, features) of the stored batches that this process takes over."""

    def write(self, indices: Tensor, labels: Tensor, features: Features, images: Tensor) -> None:
        """Store a measured batch."""


class Generation(LightningModule):
    """Samples `num_samples` images in ``trainer.test`` and measures each exactly once.

    Args:
        sampler: Generates the images.
        labels: Labels (num_samples,) of the samples 0, 1, ...
        metrics: Metrics with a reference on every process. ``results`` has their values once the
            test ends.
        batch_size: Number of images that a process samples at once.
        measured: Stores measured batches; None stores nothing.
    """

    def __init__(
        self,
        sampler: ImageSampler,
        *,
        labels: Tensor,
        metrics: GenerationMetrics,
        batch_size: int = 128,
        measured: Measured | None = None,
    ) -> None:
        super().__init__()
        # Registered as modules, so that Lightning moves them to the device.
        self.denoiser, self.metrics = sampler.denoiser, metrics
        self.sampler, self.labels = sampler, labels
        self.batch_size, self.measured = batch_size, measured
        self.results: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        """Load the stored batches and divide the remaining samples among the processes."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        self.metrics.reset()
        if self.measured is not None:
            self.measured.check()
            self.trainer.strategy.barrier("stored batches are checked")
        done = (
            torch.empty(0, dtype=torch.long) if self.measured is None else self.measured.indices()
        )
        remaining = torch.ones(len(self.labels), dtype=torch.bool)
        remaining[done] = False
        if self.measured is not None:
            for indices, labels, features in self.measured.batches(
                rank=rank, world_size=world_size
            ):
                self.metrics.update_features(features, labels, indices=indices)
        # Split without padding: no sample is measured twice.
        self.mine = remaining.nonzero().flatten()[rank::world_size]
        self.trainer.strategy.barrier("every process has loaded its stored batches")

    def test_dataloader(self) -> DataLoader:
        """Batches of (indices, labels) that this process samples."""
        return DataLoader(
            TensorDataset(self.mine, self.labels[self.mine]), batch_size=self.batch_size
        )

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Sample and measure a batch, and store it."""
        indices, labels = batch
        images = self.sampler(indices, labels, device=self.device)
        features = self.metrics.features(images)
        self.metrics.update_features(features, labels, indices=indices)
        if self.measured is not None:
            self.measured.write(indices, labels, features, images)

    def teardown(self, stage: str) -> None:
        """Compute the metrics.

        All processes take part. ``on_test_epoch_end`` would be too early: it does not run in a
        process that has no samples left.
        """
        self.results = self.metrics.compute()
        if self.metrics.num_samples != len(self.labels):
            raise RuntimeError(
                f"Only {self.metrics.num_samples} of {len(self.labels)} samples were measured. "
                "Delete the folder of stored batches and evaluate again."
            )
