"""Fréchet distance of features: FID (Heusel et al. 1706.08500) and, of spatial ones, sFID (Nash et al. 2103.03841)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.metrics.base import FeatureMetric
from tinyfusion_pl.metrics.features import Features
from tinyfusion_pl.metrics.functional import frechet_distance


class FrechetDistance(FeatureMetric):
    """Accumulates sums of features and of their products in float64: O(D^2) whatever the number of images.

    Args:
        num_features: D.
        of: ``"features"`` (FID) or ``"spatial"`` (sFID).
        kwargs: See `FeatureMetric`.

    Example:
        >>> import torch
        >>> from tinyfusion_pl.metrics import FrechetDistance
        >>> metric = FrechetDistance(2)
        >>> x = torch.tensor([[0., 0.], [2., 0.], [0., 2.], [2., 2.]])
        >>> metric.update(x, real=True)
        >>> metric.update(x + 3)  # the mean moves by (3, 3)
        >>> round(metric.compute().item(), 6)
        18.0
    """

    higher_is_better = False
    num_required = 2

    def __init__(self, num_features: int, *, of: str = "features", **kwargs: Any) -> None:
        super().__init__(of=of, num_features=num_features, **kwargs)
        for side in ("reference", "samples"):
            self.add_state(
                f"{side}_sum", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum"
            )
            self.add_state(
                f"{side}_products",
                torch.zeros(num_features, num_features, dtype=torch.float64),
                dist_reduce_fx="sum",
            )
            self.add_state(
                f"{side}_number", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum"
            )
        self._given: tuple[Tensor, Tensor] | None = None

    def update(self, features: Features | Tensor, *, real: bool = False) -> None:
        """Add features (N, D) of generated images, or of the reference (`real`)."""
        x, side = self._rows(features).double(), "reference" if real else "samples"
        if real and self._given is not None:
            raise ValueError(
                "The reference's statistics were given; images cannot be added to them."
            )
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + x.sum(0))
        setattr(self, f"{side}_products", getattr(self, f"{side}_products") + x.T @ x)
        setattr(self, f"{side}_number", getattr(self, f"{side}_number") + len(x))

    def set_reference(self, mu: Any, sigma: Any) -> None:
        """Take mean (D,) and covariance (D, D) in place of reference images, on every process alike."""
        mu, sigma = (torch.as_tensor(x).double() for x in (mu, sigma))
        self.check_statistics(mu, sigma)
        self._given = mu, sigma

    def check_statistics(self, mu: Tensor, sigma: Tensor) -> None:
        """`ValueError` unless mean and covariance are as wide as these features."""
        if (
            tuple(mu.shape) != (self.num_features,)
            or tuple(sigma.shape) != (self.num_features,) * 2
        ):
            raise ValueError(
                f"The reference's statistics have shapes {tuple(mu.shape)} and {tuple(sigma.shape)}; these {self.of} have "
                f"{self.num_features} values. It was made with another feature network: make it anew with this one."
            )

    def statistics(self, side: str = "reference") -> tuple[Tensor, Tensor]:
        """Mean (D,) and unbiased covariance (D, D) of this process's ``"reference"`` or ``"samples"``, float64.

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
                f"A Fréchet distance needs 2 or more {kind} images and has {num}: call {call} first."
            )
        mean = total / num
        return mean, (products - num * torch.outer(mean, mean)) / (num - 1)

    def compute(self) -> Tensor:
        """The distance, float64; 0 for equal statistics."""
        reference = [x.to(self.device) for x in self.statistics("reference")]
        return frechet_distance(*reference, *self.statistics("samples"))

    def reset(self) -> None:
        super().reset()
        if self.reset_real_features:
            self._given = None
