"""Noise schedules of `GaussianDiffusion`, by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_linear_betas(num_timesteps: int) -> Tensor:
    """Stable Diffusion's variances, whose square roots are evenly spaced from sqrt(8.5e-4) to sqrt(0.012): float64 (num_timesteps,).

    Rombach et al. 2112.10752; U-ViT (2209.12152) was trained with them. The ends are those of 1000 steps, whatever the count.
    """
    return torch.linspace(8.5e-4**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64).square()


def linear_betas(num_timesteps: int) -> Tensor:
    """Noise variances from 1e-4 to 0.02 at 1000 steps, scaled for other counts: float64 (num_timesteps,)."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Noise variances whose signal follows a squared cosine (Nichol & Dhariwal, equation 17), at most 0.999: float64 (num_timesteps,)."""
    signal = ((torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - signal[1:] / signal[:-1]).clamp_max(0.999)


NOISE_SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "scaled_linear": scaled_linear_betas}
