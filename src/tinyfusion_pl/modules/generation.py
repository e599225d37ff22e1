"""Sampling from a denoiser in ``trainer.test`` and measuring the images."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tinyfusion_pl.metrics import Features, GenerationMetrics
from tinyfusion_pl.objectives import ImageSampler


class Measured(Protocol):
    """What is kept of finished batches, so that an interrupted evaluation resumes from the last of them; `check` discards what cannot be
    used, in one process.
    """

    def check(self) -> None: ...

    def indices(self) -> Tensor: ...

    def batches(self, *, rank: int, world_size: int) -> Any: ...

    def write(
        self, indices: Tensor, labels: Tensor, features: Features, images: Tensor
    ) -> None: ...


class Generation(LightningModule):
    """Samples `num_samples` images over all processes in ``trainer.test`` and hands them to the metrics, each one exactly once.

    Args:
        sampler: Makes the images.
        labels: (num_samples,) of the samples 0, 1, ...
        metrics: Its reference is set on every process. Results are in ``results`` when the test ends.
        batch_size: Images sampled at once on each process.
        measured: Keeps finished batches; None: nothing is kept.
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
        self.denoiser, self.metrics = (
            sampler.denoiser,
            metrics,
        )  # modules, so that they are moved to the device
        self.sampler, self.labels, self.batch_size, self.measured = (
            sampler,
            labels,
            batch_size,
            measured,
        )
        self.results: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        self.metrics.reset()
        if self.measured is not None:
            self.measured.check()
            self.trainer.strategy.barrier("what was measured before is checked")
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
        # A share each, without padding: no sample is measured twice.
        self.mine = remaining.nonzero().flatten()[rank::world_size]
        self.trainer.strategy.barrier("every process has read what was measured before")

    def test_dataloader(self) -> DataLoader:
        return DataLoader(
            TensorDataset(self.mine, self.labels[self.mine]), batch_size=self.batch_size
        )

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        indices, labels = batch
        images = self.sampler(indices, labels, device=self.device)
        features = self.metrics.features(images)
        self.metrics.update_features(features, labels, indices=indices)
        if self.measured is not None:
            self.measured.write(indices, labels, features, images)

    def teardown(self, stage: str) -> None:
        # Not at the end of the test's epoch: a process that had nothing left to do has none, and all must take part.
        self.results = self.metrics.compute()
        if self.metrics.num_samples != len(self.labels):
            raise RuntimeError(
                f"{self.metrics.num_samples} of {len(self.labels)} samples were measured. Delete the folder of kept batches "
                "and evaluate again."
            )
