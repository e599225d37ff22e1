"""Fréchet distance of features: FID (Heusel et al. 1706.08500), sFID (Nash et al. 2103.03841)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import FeatureMetric
from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.functional import frechet_distance
from tinyfusion_pl.metrics.reference import Reference


class FrechetDistance(FeatureMetric):
    """Accumulates sums of features and of their products in float64: O(D^2) memory.

    Args:
        num_features: D.
        of: ``"features"`` (FID) or ``"spatial"`` (sFID).
        kwargs: Arguments of `FeatureMetric`.

    Example:
        >>> import torch
        >>> from tinyfusion_pl.metrics import FrechetDistance
        >>> metric = FrechetDistance(2)
        >>> x = torch.tensor([[0., 0.], [2., 0.], [0., 2.], [2., 2.]])
        >>> metric.update(x, real=True)
        >>> metric.update(x + 3)  # moves the mean by (3, 3)
        >>> round(metric.compute().item(), 6)
        18.0
    """

    higher_is_better = False
    num_required = 2

    def __init__(self, num_features: int, *, of: str = "features", **kwargs: Any) -> None:
        super().__init__(of=of, num_features=num_features, **kwargs)
        float64 = torch.float64
        for side in ("reference", "samples"):
            total = torch.zeros(num_features, dtype=float64)
            products = torch.zeros(num_features, num_features, dtype=float64)
            number = torch.zeros((), dtype=torch.long)
            self.add_state(f"{side}_sum", total, dist_reduce_fx="sum")
            self.add_state(f"{side}_products", products, dist_reduce_fx="sum")
            self.add_state(f"{side}_number", number, dist_reduce_fx="sum")
        self._given: tuple[Tensor, Tensor] | None = None

    def update(self, features: Features | Tensor, *, real: bool = False) -> None:
        """Add features (N, D) of generated images, or of the reference (`real`)."""
        x, side = self._select_rows(features).double(), "reference" if real else "samples"
        if real and self._given is not None:
            raise ValueError(
                "The reference was set by its statistics; images cannot be added to it. Call "
                "reset() first."
            )
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + x.sum(0))
        setattr(self, f"{side}_products", getattr(self, f"{side}_products") + x.T @ x)
        setattr(self, f"{side}_number", getattr(self, f"{side}_number") + len(x))

    def set_reference(self, mu: Any, sigma: Any) -> None:
        """Set mean (D,) and covariance (D, D) of the reference, equal on every process."""
        mu, sigma = (torch.as_tensor(x).double() for x in (mu, sigma))
        self._check_statistics(mu, sigma)
        self._given = mu, sigma

    def check_reference(self, reference: Reference) -> bool:
        """Return whether `reference` has statistics, or else features, of this width."""
        if self.of not in reference.statistics:
            return super().check_reference(reference)
        self._check_statistics(*reference.statistics[self.of])
        return True

    def load_reference(self, reference: Reference, *, rank: int = 0, world_size: int = 1) -> bool:
        """Take the statistics of `reference`, or else its features."""
        if self.of not in reference.statistics:
            return super().load_reference(reference, rank=rank, world_size=world_size)
        self.set_reference(*reference.statistics[self.of])
        return True

    def reference_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the reference on this process."""
        return self.statistics()

    def _check_statistics(self, mu: Tensor, sigma: Tensor) -> None:
        d = self.num_features
        if (tuple(mu.shape), tuple(sigma.shape)) != ((d,), (d, d)):
            raise ValueError(
                f"The statistics of the reference have shapes {tuple(mu.shape)} and "
                f"{tuple(sigma.shape)}, but these {self.of} have {d} values. Make the reference "
                "again with this feature network (task=reference)."
            )

    def statistics(self, side: str = "reference") -> tuple[Tensor, Tensor]:
        """Return mean (D,) and unbiased covariance (D, D) of one side on this process, float64.

        Args:
            side: ``"reference"`` or ``"samples"``.

        Raises:
            ValueError: for fewer than 2 images.
        """
        if side == "reference" and self._given is not None:
            return self._given
        number, total, products = (
            getattr(self, f"{side}_{name}") for name in ("number", "sum", "products")
        )
        if (num := int(number)) < 2:
            kind, call = (
                ("generated", "update(features)")
                if side == "samples"
                else ("reference", "update(features, real=True)")
            )
            raise ValueError(
                f"A Fréchet distance needs 2 or more {kind} images and has {num}: call {call} "
                "first."
            )
        mean = total / num
        return mean, (products - num * torch.outer(mean, mean)) / (num - 1)

    def compute(self) -> Tensor:
        """Return the distance, float64; 0 for equal statistics."""
        mu, sigma = self.statistics("reference")
        return frechet_distance(
            mu.to(self.device), sigma.to(self.device), *self.statistics("samples")
        )

    def reset(self) -> None:
        """Clear the samples, and the reference too if `reset_real_features`."""
        super().reset()
        if self.reset_real_features:
            self._given = None
