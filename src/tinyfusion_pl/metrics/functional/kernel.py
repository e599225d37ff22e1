"""Kernel distances of two sets of features.

KID: Bińkowski et al. 1801.01401. CMMD: Jayasumana et al. 2401.09603.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kernel_inception_distance(
    reference: Any, samples: Any, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Tensor:
    """Return the unbiased squared MMD with kernel (x.y / D + 1)^3, averaged over random subsets.

    float64, around 0 for equal distributions. Computed with `poly_mmd` of torchmetrics. The subsets
    depend on `seed` alone, so the same features in the same order have the same distance.

    Args:
        reference: Features (N, D), tensor or array.
        samples: Features (M, D), tensor or array.
        num_subsets: Number of subsets (published: 100).
        subset_size: Images per subset and side (published: 1000), from 2 to min(N, M).
        seed: Seed of the subsets.

    Raises:
        ValueError: for subsets larger than a set.
    """
    from torchmetrics.image.kid import poly_mmd

    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            f"num_subsets is {num_subsets} and subset_size {subset_size}; give at least 1 and 2."
        )
    for name, x in (("reference", reference), ("generated", samples)):
        if len(x) < subset_size:
            raise ValueError(
                f"Subsets of {subset_size} need {subset_size} or more {name} images, got {len(x)}. "
                "Give a smaller subset_size."
            )
    generator = torch.Generator().manual_seed(seed)
    reference, samples = (torch.as_tensor(x).double() for x in (reference, samples))

    def subset(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)]

    return torch.stack(
        [poly_mmd(subset(reference), subset(samples)) for _ in range(num_subsets)]
    ).mean()


def gaussian_mmd(
    reference: Any,
    samples: Any,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    max_block_mib: int = 256,
) -> Tensor:
    """Return `scale` times the squared MMD with kernel exp(-|x - y|^2 / (2 sigma^2)), all pairs.

    float64, >= 0 up to rounding. CMMD applies it with these defaults to CLIP embeddings of unit
    length.

    Args:
        reference: Features (N, D), N >= 1, tensor or array.
        samples: Features (M, D), M >= 1, tensor or array.
        sigma: Width of the kernel, > 0.
        scale: Factor of the distance.
        max_block_mib: Memory for kernel values at a time, in MiB.

    Raises:
        ValueError: for an empty set.
    """
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}; give a number > 0 (published: 10).")
    if not len(reference) or not len(samples):
        raise ValueError(
            f"A kernel distance needs images on both sides, got {len(reference)} reference and "
            f"{len(samples)} generated images."
        )
    x, y = (torch.as_tensor(x).double() for x in (reference, samples))

    def mean(a: Tensor, b: Tensor) -> Tensor:
        num_rows = max(1, max_block_mib * 2**20 // (3 * b.element_size() * len(b)))
        sums = [
            torch.cdist(rows, b).square().div(-2 * sigma**2).exp().sum()
            for rows in a.split(num_rows)
        ]
        return torch.stack(sums).sum() / (len(a) * len(b))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
