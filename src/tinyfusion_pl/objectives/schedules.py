"""Noise schedules beyond the linear one of `GaussianDiffusion`."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_linear_betas(num_timesteps: int) -> Tensor:
    """Stable Diffusion's variances, whose square roots are evenly spaced from sqrt(8.5e-4) to sqrt(0.012): float64 (num_timesteps,).

    Rombach et al. 2112.10752; U-ViT (2209.12152) was trained with them. The ends are those of 1000 steps, whatever the count.
    """
    return torch.linspace(8.5e-4**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64).square()
