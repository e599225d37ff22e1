"""Sampling from a denoiser and measuring the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


def noise_of(indices: Sequence[int] | Tensor, shape: Sequence[int], *, seed: int) -> Tensor:
    """Standard normal noise (N, *shape) that depends on the sample's index and the seed alone, not on batches or devices."""
    rows = []
    for index in torch.as_tensor(indices).tolist():
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


def balanced_labels(num_samples: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., num_classes - 1, 0, 1, ... (num_samples,): as equal in number as they can be."""
    return torch.arange(num_samples) % num_classes


class Generation(LightningModule):
    """Samples pictures for batches of (index, label) in ``trainer.test`` and hands them to the metrics.

    Args:
        denoiser: In evaluation mode while it samples.
        objective: Has ``sample``.
        latent_shape: (C, H, W) of what the denoiser works on.
        decode: Latents (N, C, H, W) -> uint8 pictures (N, C', H', W').
        metrics: ``update(pictures, labels)`` and ``compute() -> dict``; its reference is set. None: pictures only.
        sampling: Arguments of ``objective.sample``: num_sampling_steps, sampler, guidance_scale, guidance_channels, ...
        seed: Of the noise; sample i has the same noise whatever the batch size or number of devices.
    """

    def __init__(self, denoiser: nn.Module, *, objective: Any, latent_shape: Sequence[int], decode: Callable[[Tensor], Tensor],
                 metrics: nn.Module | None = None, sampling: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.denoiser, self.objective, self.metrics = denoiser, objective, metrics
        self.latent_shape, self.decode, self.sampling, self.seed = tuple(latent_shape), decode, dict(sampling or {}), seed
        self.results: dict[str, float] = {}

    @torch.no_grad()
    def generate(self, indices: Tensor, labels: Tensor) -> Tensor:
        """uint8 pictures (N, C, H, W) of samples `indices` (N,) with `labels` (N,)."""
        z = noise_of(indices, self.latent_shape, seed=self.seed)
        options = dict(self.sampling)
        if options.get("sampler", "ddpm") != "ddim" or options.get("eta"):
            steps = options["num_sampling_steps"]
            options["noise"] = noise_of(indices, (steps, *self.latent_shape), seed=self.seed + 1).transpose(0, 1).to(self.device)
        latents = self.objective.sample(self.denoiser.eval(), z.to(self.device), labels.to(self.device), **options)
        return self.decode(latents)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        indices, labels = batch
        self.metrics.update(self.generate(indices, labels), labels)

    def on_test_epoch_end(self) -> None:
        self.results = self.metrics.compute()
