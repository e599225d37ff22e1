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
    """Deterministic at ``eta=0``; as much noise as DDPM at ``eta=1``."""

    def is_random(self, options: GaussianSampling) -> bool:
        """True for ``eta > 0``."""
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
        """Equation 12 with sigma scaled by ``eta``."""
        a = tables.at(tables.alphas_cumprod, t, x)
        before = tables.at(tables.alphas_cumprod_prev, t, x)
        epsilon = tables.epsilon_from_x0(x, t, x0)  # consistent with a clipped x0
        deviation = options.eta * ((1 - before) / (1 - a)).sqrt() * (1 - a / before).sqrt()
        # Negative only by rounding, which would give NaN at eta=1 with few steps.
        direction = (1 - before - deviation**2).clamp_min(0).sqrt()
        return x0 * before.sqrt() + direction * epsilon, deviation
