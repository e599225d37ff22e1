"""Random latents in shards, to try out a recipe without data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tinyfusion_pl.data.extraction import ShardWriter, begin, finish
from tinyfusion_pl.data.shards import LatentsInfo
from tinyfusion_pl.data.vae import VAE

RANDOM = "random"
BATCH_SIZE = 32


def write_random_latents(
    root: Path, vae: VAE, *, image_size: int = 256, num_samples: int = 64, num_classes: int = 1000
) -> None:
    """Write a finished extraction to `root`, with random means and log-variances.

    The latents have the shape and scale of those of `vae`, and are the same on each call.
    """
    info = LatentsInfo(
        content="moments",
        dtype="float32",
        latent_shape=vae.latent_shape(image_size),
        num_samples=num_samples,
        shard_size=BATCH_SIZE,
        image_size=image_size,
        vae=vae.record(),
        images=RANDOM,
        listing="",
        seed=0,
        classes=[str(i) for i in range(num_classes)],
    )
    root.mkdir(parents=True, exist_ok=True)
    begin(root, info)
    writer = ShardWriter(root, info, save_every=BATCH_SIZE)
    generator = torch.Generator().manual_seed(0)
    for numbers in writer.batches(BATCH_SIZE):
        mean = torch.randn(len(numbers), 2, *info.latent_shape, generator=generator)
        mean = mean / vae.scaling_factor  # standard deviation 1 once scaled
        moments = torch.cat([mean, torch.full_like(mean, -4.0)], 2)  # (n, 2, 2C, h, w)
        labels = torch.randint(num_classes, (len(numbers),), generator=generator)
        writer.add(torch.tensor(numbers), moments, labels)
    finish(root, info)


def random_images(
    image_size: int, *, num_samples: int = 16, num_classes: int = 1000
) -> tuple[Tensor, Tensor]:
    """Return uint8 noise (num_samples, 3, image_size, image_size) and labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        256, (num_samples, 3, image_size, image_size), dtype=torch.uint8, generator=generator
    )
    return images, torch.randint(num_classes, (num_samples,), generator=generator)
