"""Sampling speed of several models, compared in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from tinyfusion_pl.objectives.image_sampler import ImageSampler


def images_per_second(
    samplers: Mapping[str, ImageSampler], labels: Tensor, *, num_rounds: int, device: torch.device
) -> dict[str, float]:
    """Images per second of each model.

    The models take turns, so that other load on the machine affects all of them.

    Args:
        samplers: Name of the model -> sampler.
        labels: Labels of one batch (N,).
        num_rounds: Batches of each model; 0 returns an empty dict.
        device: Device of the models.
    """
    indices = torch.arange(len(labels))
    seconds: dict[str, list[float]] = {role: [] for role in samplers}
    for _ in range(num_rounds):
        for role, sampler in samplers.items():
            on_device(sampler, device)
            start = time.perf_counter()
            sampler(indices, labels, device=device).cpu()
            seconds[role].append(time.perf_counter() - start)
    return {role: len(labels) / statistics.median(each) for role, each in seconds.items() if each}


def on_device(sampler: ImageSampler, device: torch.device) -> torch.device:
    """`device`, with the model on it."""
    sampler.denoiser.to(device)
    return device
