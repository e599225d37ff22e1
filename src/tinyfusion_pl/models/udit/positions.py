"""2-D rotary position embedding of U-DiT's attention."""

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10000.0


def rotation(grid_size: int, head_size: int, device: torch.device) -> Tensor:
    """Cosines and sines of the 2-D rotary embedding: float32 (1, 2, grid_size**2, head_size / 2).

    Channel pairs rotate alternately with the column and the row, at head_size / 4 frequencies. The
    leading dimension of 1 marks it as shared by the batch.
    """
    num_frequencies = head_size // 4
    frequencies = ROTARY_BASE ** -(
        torch.arange(num_frequencies, dtype=torch.float32, device=device) / num_frequencies
    )
    places = torch.arange(grid_size, dtype=torch.float32, device=device)
    axis = places[:, None] * frequencies  # (G, F)
    pairs = torch.stack([axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)], -1)
    angles = pairs.flatten(1)  # (G*G, 2F)
    return torch.stack([angles.cos(), angles.sin()])[None]  # (1, 2, T, D/2)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels of `x` (..., T, D) by its angle, see `rotation`."""
    cos, sin = by[0]  # (T, D/2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., T, D/2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)  # (..., T, D/2, 2)
    return turned.flatten(-2)  # (..., T, D)
