"""Kernel distances of features: KID, and CMMD's Gaussian one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion_pl.metrics.base import RowsMetric
from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.functional import gaussian_mmd, kernel_inception_distance


class _KernelDistance(RowsMetric):
    """Keeps features and the samples' numbers, so that subsets do not depend on the order of arrival."""

    higher_is_better = False

    def __init__(self, num_features: int, *, of: str = "features", **kwargs: Any) -> None:
        super().__init__(of=of, num_features=num_features, **kwargs)
        for side in ("reference", "samples"):
            self._add_rows(f"{side}_rows", num_features, torch.float32)
            self._add_rows(f"{side}_order", 1, torch.long)

    def update(
        self, features: Features | Tensor, *, indices: Tensor | None = None, real: bool = False
    ) -> None:
        """Add features (N, D) of generated images with numbers `indices` (N,), or of the reference (`real`)."""
        x, side = self._rows(features).float(), "reference" if real else "samples"
        if indices is None:
            indices = torch.arange(len(x)) + sum(
                len(rows) for rows in getattr(self, f"{side}_rows")
            )
        getattr(self, f"{side}_rows").append(x)
        getattr(self, f"{side}_order").append(indices.to(x.device).long().unsqueeze(1))

    def _sorted(self, side: str) -> Tensor:
        return self._joined(f"{side}_rows")[
            self._joined(f"{side}_order")[:, 0].argsort(stable=True)
        ]


class KernelInceptionDistance(_KernelDistance):
    """KID: see `kernel_inception_distance`; the mean over seeded subsets.

    Args:
        num_features: Width of the features.
        num_subsets, subset_size, seed: Published: 100 subsets of 1000.
        kwargs: See `FeatureMetric`.
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
        """The distance, float64, around 0 for equal distributions."""
        return kernel_inception_distance(
            self._sorted("reference"), self._sorted("samples"), **self.options
        )


class GaussianMMD(_KernelDistance):
    """CMMD where the features are CLIP's: see `gaussian_mmd`.

    Args:
        num_features: Width of the features.
        normalize: Scale each row to unit length first, as CMMD does.
        sigma, scale, max_block_mib: See `gaussian_mmd`.
        kwargs: See `FeatureMetric`.
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
        self.options = {"sigma": sigma, "scale": scale, "max_block_mib": max_block_mib}

    def compute(self) -> Tensor:
        """The distance, float64, 0 for equal sets."""
        sides = (self._sorted("reference"), self._sorted("samples"))
        if self.normalize:
            sides = tuple(F.normalize(side.double(), dim=1) for side in sides)
        return gaussian_mmd(*sides, **self.options)
