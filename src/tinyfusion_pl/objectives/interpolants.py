"""SiT's stochastic interpolants: losses, distillation losses, ODE and SDE sampling.

Ma et al., arXiv 2401.08740.

x_t = alpha(t) x0 + sigma(t) noise, t from 0 (noise) to 1 (data). Loss: mean square of the
prediction's error (equations 3, 4 and 9, with the weightings of section 3.2 and table 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.base import Denoises, Distance, Draw, check_channels, mean_square
from tinyfusion_pl.objectives.interpolant_process import InterpolantProcess
from tinyfusion_pl.objectives.interpolant_sampling import SamplingOptions, sample_interpolant
from tinyfusion_pl.objectives.paths import Coefficients

TRAIN_EPS = {"vp": 1e-5}  # both published
EPS = 1e-3


class Interpolants(InterpolantProcess):
    """The interpolant process, its training and distillation losses, and its samplers.

    Args:
        path: See `InterpolantProcess`.
        prediction: See `InterpolantProcess`.
        loss_weighting: See `InterpolantProcess`.
        train_eps: See `InterpolantProcess`.
        sample_eps: See `InterpolantProcess`.
    """

    sampling_options = SamplingOptions  # the options of `sample`

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser whose prediction and latents differ in channels."""
        check_channels(denoiser, expected=1, objective="an interpolant")

    # -- training -------------------------------------------------------------
    def draw(
        self, x0: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Draw[Tensor]:
        """x_t = alpha(t) x0 + sigma(t) noise; times t (N,) default to uniformly random."""
        if t is None:
            eps = TRAIN_EPS.get(self.path, EPS) if self.train_eps is None else self.train_eps
            start, end = (eps * singular for singular in self.singular_ends())
            t = start + (1 - start - end) * torch.rand(len(x0), device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        c = self.coefficients(t, x0)
        return Draw(x0, (c.alpha * x0 + c.sigma * noise).to(x0.dtype), t, noise)

    def losses(self, output: Tensor, draw: Draw[Tensor]) -> dict[str, Tensor]:
        """Per sample (N,): "loss", the weighted mean square of the prediction's error.

        The error of a score is multiplied by sigma, which makes it the error of the noise.

        Raises:
            ValueError: If the shapes of output and latents differ.
        """
        c = self.coefficients(draw.t, draw.x_t)
        return {"loss": self._loss(output, c.target(self.prediction, draw.x0, draw.noise), c, draw)}

    def distillation_losses(
        self,
        output: Tensor,
        teacher_output: Tensor,
        draw: Draw[Tensor],
        *,
        distance: Distance = mean_square,
    ) -> dict[str, Tensor]:
        """Per sample (N,): "loss_kd", the `distance` to the teacher, weighted as in `losses`."""
        c = self.coefficients(draw.t, draw.x_t)
        return {
            "loss_kd": self._loss(
                output, self.checked(teacher_output.detach(), draw.x_t), c, draw, distance
            )
        }

    def _loss(
        self,
        output: Tensor,
        target: Tensor,
        c: Coefficients,
        draw: Draw[Tensor],
        distance: Distance = mean_square,
    ) -> Tensor:
        output = self.checked(output, draw.x_t)
        return distance(self._weighted(output, c), self._weighted(target, c))

    def _weighted(self, prediction: Tensor, c: Coefficients) -> Tensor:
        """`prediction` times the square root of the weight of its squared error."""
        if self.prediction == "score":
            prediction = prediction * c.sigma
        if self.loss_weighting == "velocity":
            prediction = prediction * c.diffusion / c.sigma
        elif self.loss_weighting == "likelihood":
            prediction = prediction * c.diffusion.sqrt() / c.sigma
        return prediction

    # -- sampling -------------------------------------------------------------
    def check_sampling(self, **options: Any) -> None:
        """Raise ValueError for options that `sample` does not accept."""
        SamplingOptions(**options).interval(self)

    def num_noises(self, **options: Any) -> int:
        """One per random step: all steps of an SDE except a separate last step."""
        return SamplingOptions(**options).num_random_steps

    @torch.no_grad()
    def sample(self, denoiser: Denoises, z: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Samples (N, C, H, W) from noise `z`; see `sample_interpolant` and `SamplingOptions`."""
        return sample_interpolant(self, denoiser, z, y, **options)
