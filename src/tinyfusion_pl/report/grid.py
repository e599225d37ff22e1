"""Writes images as a grid into one file."""

from __future__ import annotations

import os

from torch import Tensor

from tinyfusion_pl.artifacts import atomic_path

LEAST = 64  # pixels per side, so that 8x8 digits are visible


def write_grid(path: str | os.PathLike, images: Tensor, *, num_columns: int = 10) -> None:
    """Write uint8 images (N, C, H, W) as a PNG grid; small ones are enlarged without smoothing."""
    from torchvision.transforms.v2.functional import to_pil_image
    from torchvision.utils import make_grid

    factor = max(1, LEAST // images.shape[-1])
    images = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(images, nrow=num_columns, padding=2, pad_value=128)  # (3, H', W')
    with atomic_path(path) as temporary:
        to_pil_image(grid).save(temporary)
