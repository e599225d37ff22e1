"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinyfusion_pl.protocols import Denoises


def guided(
    denoiser: Denoises,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    guidance_scale: float,
    guidance_channels: int | None,
) -> Tensor:
    """The denoiser's output with classifier-free guidance.

    The first `guidance_channels` channels are e + (s - 1)(e - e_null).

    Args:
        denoiser: Its ``num_classes`` is the null label.
        x: (N, C, H, W).
        t: (N,).
        y: (N,).
        guidance_scale: s >= 0. 1 disables guidance and runs the batch once; 0 uses the null label
            only. The scripts of DiT and SiT use the same scale; U-ViT's ``cfg.sample.scale`` is s -
            1 (its 0.4 is 1.4 here).
        guidance_channels: Number of guided channels (published: 3). None, or more than C: all C of
            the prediction.
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
    """Raise ValueError for a scale or a number of channels that `guided` does not accept."""
    if not (
        isinstance(guidance_scale, (int, float))
        and math.isfinite(guidance_scale)
        and guidance_scale >= 0
    ):
        raise ValueError(
            f"guidance_scale is {guidance_scale}; give a finite number >= 0: 1 disables guidance, "
            "0 ignores the labels (published: 1.5)."
        )
    if guidance_channels is not None and guidance_channels < 1:
        raise ValueError(
            f"guidance_channels is {guidance_channels}; give at least 1 (published: 3), or null "
            "for all."
        )
