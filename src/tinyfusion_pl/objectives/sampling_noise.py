"""The noise of random samplers: given for each step, or drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def check_noise(noise: Tensor | None, z: Tensor, *, num_noises: int) -> None:
    """Raise ValueError unless `noise` is None or `num_noises` tensors in the shape of `z`."""
    if noise is not None and noise.shape != (expected := (num_noises, *z.shape)):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; expected {tuple(expected)} (steps, then the "
            "shape of z)."
        )


def get_noise(noise: Tensor | None, i: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """``noise[i]``, or else standard normal noise in the shape of `x`."""
    if noise is not None:
        return noise[i]
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
