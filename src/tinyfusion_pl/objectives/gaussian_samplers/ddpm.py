"""DDPM: ancestral sampling (Ho et al., arXiv 2006.11239, algorithm 2).

The learned variance is that of arXiv 2102.09672, equation 15.
"""

from __future__ import annotations

from torch import Tensor

from tinyfusion_pl.objectives.gaussian_process import GaussianTables
from tinyfusion_pl.objectives.gaussian_samplers.base import (
    GaussianSampling,
    StepSampler,
    register_sampler,
)


@register_sampler("ddpm")
class DDPM(StepSampler):
    """Samples the posterior of each step."""

    def is_random(self, options: GaussianSampling) -> bool:
        """Always."""
        return True

    def step(
        self,
        tables: GaussianTables,
        x: Tensor,
        t: Tensor,
        x0: Tensor,
        fraction: Tensor | None,
        options: GaussianSampling,
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior."""
        return tables.posterior_mean(x0, x, t), (0.5 * tables.log_variance(fraction, t, x)).exp()
