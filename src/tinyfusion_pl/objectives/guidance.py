"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def guided(
    denoiser: nn.Module,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    guidance_scale: float,
    guidance_channels: int | None,
) -> Tensor:
    """The denoiser's output with classifier-free guidance: e + (s - 1)(e - e_null) in the first `guidance_channels` channels.

    Args:
        denoiser: Its ``num_classes`` is the null label.
        x, t, y: (N, C, H, W), (N,), (N,).
        guidance_scale: s >= 0. 1 is no guidance, and runs the batch once; 0 is the null label alone. DiT's and SiT's scripts count
            alike; U-ViT's ``cfg.sample.scale`` is s - 1 (its 0.4 is 1.4 here).
        guidance_channels: Channels that are guided (published: 3); None or more than there are: all C of the prediction.
    """
    if guidance_scale == 1:
        return denoiser(x, t, y)
    null = torch.full_like(y, denoiser.num_classes)
    conditional, unconditional = denoiser(
        torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])
    ).chunk(2)
    k = x.shape[1] if guidance_channels is None else min(guidance_channels, x.shape[1])
    mixed = unconditional[:, :k] + guidance_scale * (conditional[:, :k] - unconditional[:, :k])
    return torch.cat([mixed, conditional[:, k:]], 1)


def check_guidance(guidance_channels: int | None, guidance_scale: float = 1.0) -> None:
    """`ValueError` for a scale or a number of guided channels that `guided` has no meaning for."""
    if not (
        isinstance(guidance_scale, (int, float))
        and math.isfinite(guidance_scale)
        and guidance_scale >= 0
    ):
        raise ValueError(
            f"guidance_scale is {guidance_scale}; give a finite number >= 0: 1 is no guidance, 0 ignores the labels "
            "(published: 1.5)."
        )
    if guidance_channels is not None and guidance_channels < 1:
        raise ValueError(
            f"guidance_channels is {guidance_channels}; give at least 1 (published: 3), or null for all."
        )
