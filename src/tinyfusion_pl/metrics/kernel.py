"""Kernel distances of features: KID, and the Gaussian kernel distance of CMMD."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion_pl.metrics.base import RowsMetric
from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.functional import gaussian_mmd, kernel_inception_distance


class _KernelDistance(RowsMetric):
    """Keeps features and sample numbers, so that subsets do not depend on the order of arrival."""

    higher_is_better = False

    def __init__(self, num_features: int, *, of: str = "features", **kwargs: Any) -> None:
        super().__init__(of=of, num_features=num_features, **kwargs)
        for side in ("reference", "samples"):
            self._add_rows(f"{side}_rows", num_features, torch.float32)
            self._add_rows(f"{side}_order", 1, torch.long)

    def update(
        self, features: Features | Tensor, *, indices: Tensor | None = None, real: bool = False
    ) -> None:
        """Add features (N, D) of generated images, or of the reference (`real`).

        Args:
            features: `Features`, or the tensor of them that this metric reads.
            indices: Numbers (N,) of the images; default: in order of arrival.
            real: Whether the images are reference images.
        """
        x, side = self._select_rows(features).float(), "reference" if real else "samples"
        if indices is None:
            num_before = sum(len(rows) for rows in getattr(self, f"{side}_rows"))
            indices = torch.arange(len(x)) + num_before
        getattr(self, f"{side}_rows").append(x)
        getattr(self, f"{side}_order").append(indices.to(x.device).long().unsqueeze(1))

    def _sorted(self, side: str) -> Tensor:
        order = self._join_rows(f"{side}_order")[:, 0].argsort(stable=True)
        return self._join_rows(f"{side}_rows")[order]


class KernelInceptionDistance(_KernelDistance):
    """KID, averaged over seeded subsets; see `kernel_inception_distance`.

    Args:
        num_features: Width of the features.
        num_subsets: Number of subsets (published: 100).
        subset_size: Images per subset and side (published: 1000).
        seed: Seed of the subsets.
        kwargs: Arguments of `FeatureMetric`.
    """

    SETTINGS = ("options",)

    def __init__(
        self,
        num_features: int,
        *,
        num_subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, **kwargs)
        self.options = {"num_subsets": num_subsets, "subset_size": subset_size, "seed": seed}
        self.num_required = subset_size

    def compute(self) -> Tensor:
        """Return the distance, float64; around 0 for equal distributions."""
        return kernel_inception_distance(
            self._sorted("reference"), self._sorted("samples"), **self.options
        )


class GaussianMMD(_KernelDistance):
    """Gaussian kernel distance; CMMD if the features are CLIP embeddings. See `gaussian_mmd`.

    Args:
        num_features: Width of the features.
        normalize: Scale each row to unit length first, as CMMD does.
        sigma: Width of the kernel.
        scale: Factor of the distance.
        max_block_mib: Memory for kernel values at a time, in MiB.
        kwargs: Arguments of `FeatureMetric`.
    """

    SETTINGS = ("normalize", "options")

    def __init__(
        self,
        num_features: int,
        *,
        normalize: bool = True,
        sigma: float = 10.0,
        scale: float = 1000.0,
        max_block_mib: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, **kwargs)
        self.normalize = normalize
        self.options: dict[str, Any] = {
            "sigma": sigma,
            "scale": scale,
            "max_block_mib": max_block_mib,
        }

    def compute(self) -> Tensor:
        """Return the distance, float64; 0 for equal sets."""
        reference, samples = self._sorted("reference"), self._sorted("samples")
        if self.normalize:
            reference, samples = (F.normalize(x.double(), dim=1) for x in (reference, samples))
        return gaussian_mmd(reference, samples, **self.options)
