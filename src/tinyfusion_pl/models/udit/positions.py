"""2-D rotary position embedding of U-DiT's attention."""

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10000.0


def rotation(grid_size: int, head_size: int, device: torch.device) -> Tensor:
    """Cosines and sines of the 2-D rotary position embedding: float32 (1, 2, grid_size**2, head_size / 2).

    The channel pairs turn in turn with the column and with the row, at head_size / 4 frequencies. The leading axis of 1 tells that it is
    shared by the batch.
    """
    num_frequencies = head_size // 4
    frequencies = ROTARY_BASE ** -(
        torch.arange(num_frequencies, dtype=torch.float32, device=device) / num_frequencies
    )
    axis = (
        torch.arange(grid_size, dtype=torch.float32, device=device)[:, None] * frequencies
    )  # (G, F)
    angles = torch.stack(
        [axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)], -1
    ).flatten(1)  # (G*G, 2F)
    return torch.stack([angles.cos(), angles.sin()])[None]  # (1, 2, T, D/2)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Each pair of neighbouring channels of `x` (..., T, D) turned by its angle, see `rotation`."""
    cos, sin = by[0]  # (T, D/2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., T, D/2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(
        -2
    )  # (..., T, D)
