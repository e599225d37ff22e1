"""The noise of random samplers: given step by step, or drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def check_noise(noise: Tensor | None, z: Tensor, *, num_noises: int) -> None:
    """`ValueError` unless `noise`, where given, is `num_noises` tensors of the shape of `z`."""
    if noise is not None and noise.shape != (expected := (num_noises, *z.shape)):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; expected {tuple(expected)} (steps, then the shape of z)."
        )


def given_or_drawn(
    noise: Tensor | None, i: int, x: Tensor, generator: torch.Generator | None
) -> Tensor:
    """``noise[i]``, or standard normal noise in the shape of `x`, drawn where the generator is."""
    if noise is not None:
        return noise[i]
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
