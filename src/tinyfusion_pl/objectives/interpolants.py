"""SiT's stochastic interpolants (Ma et al., arXiv 2401.08740): losses, distillation losses, ODE and SDE sampling.

x_t = alpha(t) x0 + sigma(t) noise, t from 0 (noise) to 1 (data). Loss: mean square of the prediction's error (equations 3, 4 and 9 with
the weightings of section 3.2 and table 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.base import Distance, Draw, check_channels, mean_square
from tinyfusion_pl.objectives.interpolant_process import InterpolantProcess
from tinyfusion_pl.objectives.interpolant_sampling import SamplingOptions, sample_interpolant
from tinyfusion_pl.objectives.paths import Coefficients

TRAIN_EPS = {"vp": 1e-5}  # published, as the two below
EPS = 1e-3


class Interpolants(InterpolantProcess):
    """The interpolant process, its training and distillation losses, and its samplers.

    Args:
        path, prediction, loss_weighting, train_eps, sample_eps: See `InterpolantProcess`.
    """

    sampling_options = SamplingOptions  # has the parameters that `sample` takes

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser that predicts another number of channels than its latents have."""
        check_channels(denoiser, expected=1, objective="an interpolant")

    # -- training -----------------------------------------------------------------------------------------------------------------------
    def draw(self, x0: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None) -> Draw:
        """x_t = alpha(t) x0 + sigma(t) noise, at uniformly random times t (N,) unless given."""
        if t is None:
            eps = TRAIN_EPS.get(self.path, EPS) if self.train_eps is None else self.train_eps
            start, end = (eps * singular for singular in self.singular_ends())
            t = start + (1 - start - end) * torch.rand(len(x0), device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        c = self.coefficients(t, x0)
        return Draw(x0, (c.alpha * x0 + c.sigma * noise).to(x0.dtype), t, noise)

    def losses(self, output: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Per sample (N,): "loss", the weighted mean square of the prediction's error.

        A score's error is taken times sigma, which makes it the noise's.

        Raises:
            ValueError: for another number of channels than the latents have.
        """
        c = self.coefficients(draw.t, draw.x_t)
        return {"loss": self._loss(output, c.target(self.prediction, draw.x0, draw.noise), c, draw)}

    def distillation_losses(
        self,
        output: Tensor,
        teacher_output: Tensor,
        draw: Draw,
        *,
        distance: Distance = mean_square,
    ) -> dict[str, Tensor]:
        """Per sample (N,): "loss_kd", the same as the "loss" of `losses` with the teacher's output as the target, by `distance`."""
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
        draw: Draw,
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

    # -- sampling -----------------------------------------------------------------------------------------------------------------------
    def check_sampling(self, **options: Any) -> None:
        """Raise ValueError for options that `sample` would refuse."""
        SamplingOptions(**options).interval(self)

    def num_noises(self, **options: Any) -> int:
        """One for each step where the sampler is random: all of an SDE's but a last step of its own kind."""
        return SamplingOptions(**options).num_random_steps

    @torch.no_grad()
    def sample(self, denoiser: nn.Module, z: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Samples (N, C, H, W) from noise `z`; see `sample_interpolant` and `SamplingOptions` (interpolant_sampling)."""
        return sample_interpolant(self, denoiser, z, y, **options)
