"""DDIM (Song et al., arXiv 2010.02502, equation 12)."""

from __future__ import annotations

from torch import Tensor

from tinyfusion_pl.objectives.gaussian_process import GaussianTables
from tinyfusion_pl.objectives.gaussian_samplers.base import (
    GaussianSampling,
    StepSampler,
    register_sampler,
)


@register_sampler("ddim")
class DDIM(StepSampler):
    """Without noise at ``eta=0``, DDPM's amount of it at ``eta=1``."""

    def is_random(self, options: GaussianSampling) -> bool:
        return options.eta > 0

    def step(
        self,
        tables: GaussianTables,
        x: Tensor,
        t: Tensor,
        x0: Tensor,
        fraction: Tensor | None,
        options: GaussianSampling,
    ) -> tuple[Tensor, Tensor]:
        a, before = (
            tables.at(tables.alphas_cumprod, t, x),
            tables.at(tables.alphas_cumprod_prev, t, x),
        )
        epsilon = tables.epsilon_from_x0(x, t, x0)  # of the clipped x0
        deviation = options.eta * ((1 - before) / (1 - a)).sqrt() * (1 - a / before).sqrt()
        # Never negative but for rounding, which would give NaN at eta 1 and few steps.
        direction = (1 - before - deviation**2).clamp_min(0).sqrt()
        return x0 * before.sqrt() + direction * epsilon, deviation
