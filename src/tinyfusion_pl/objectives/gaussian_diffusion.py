"""Gaussian diffusion as in ADM and DiT: epsilon prediction, learned variance, loss = mse + vb.

Ho et al. 2006.11239, Nichol & Dhariwal 2102.09672 (hybrid loss, equation 16), Dhariwal & Nichol
2105.05233.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.base import Denoises, Distance, Draw, check_channels, mean_square
from tinyfusion_pl.objectives.gaussian_process import GaussianProcess
from tinyfusion_pl.objectives.gaussian_samplers import GaussianSampling
from tinyfusion_pl.objectives.likelihood import discretized_gaussian_log_likelihood, gaussian_kl


class GaussianDiffusion(GaussianProcess):
    """The diffusion process with its training and distillation losses and its samplers.

    Args:
        num_timesteps: See `GaussianProcess`.
        noise_schedule: See `GaussianProcess`.
        learn_sigma: See `GaussianProcess`.
    """

    sampling_options = GaussianSampling  # the options of `sample`

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser whose number of channels does not match `learn_sigma`."""
        check_channels(
            denoiser,
            expected=2 if self.learn_sigma else 1,
            objective=f"Gaussian diffusion with learn_sigma={self.learn_sigma}",
        )

    # -- training -------------------------------------------------------------
    def draw(
        self, x0: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Draw[Tensor]:
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise; timesteps t (N,) default to random."""
        if t is None:
            t = torch.randint(self.num_timesteps, (len(x0),), device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        a = self.tables.alphas_cumprod
        return Draw(
            x0,
            self.tables.at(a.sqrt(), t, x0) * x0 + self.tables.at((1 - a).sqrt(), t, x0) * noise,
            t,
            noise,
        )

    def losses(self, output: Tensor, draw: Draw[Tensor]) -> dict[str, Tensor]:
        """Per sample (N,): "mse" of epsilon, "vb", and their sum "loss".

        "vb" is in bits per dimension, with the mean detached, times T/1000.
        """
        epsilon, fraction = self.split(output, draw.x_t)
        terms = {"mse": _mean((draw.noise - epsilon).square())}
        if fraction is None:
            return {"loss": terms["mse"], **terms}
        true_mean = self.tables.posterior_mean(draw.x0, draw.x_t, draw.t)
        true_log_variance = self.tables.at(
            self.tables.posterior_log_variance_clipped, draw.t, draw.x_t
        )
        terms["vb"] = self._vb(
            epsilon.detach(), fraction, draw, true_mean, true_log_variance, draw.x0
        )
        return {"loss": terms["mse"] + terms["vb"], **terms}

    def distillation_losses(
        self,
        output: Tensor,
        teacher_output: Tensor,
        draw: Draw[Tensor],
        *,
        distance: Distance = mean_square,
    ) -> dict[str, Tensor]:
        """Per sample (N,): "mse_kd", "vb_kd", and their sum "loss_kd".

        "mse_kd" is the `distance` between the student's and the teacher's epsilon. "vb_kd" is the
        KL divergence in bits per dimension of the student's step from the teacher's, with the
        student's mean detached so that it trains the variance only. At t = 0 "vb_kd" is the
        student's likelihood of the data, as "vb" is. Published recovery: 0.9 * "loss_kd" + 0.1 *
        the "loss" of `losses` + 0.01 * the feature loss of `tinyfusion_pl.distill`.
        """
        (epsilon, fraction), (teacher_epsilon, teacher_fraction) = (
            self.split(o, draw.x_t) for o in (output, teacher_output.detach())
        )
        terms = {"mse_kd": distance(epsilon, teacher_epsilon)}
        if fraction is None or teacher_fraction is None:  # both, or neither
            return {"loss_kd": terms["mse_kd"], **terms}
        true_mean, true_log_variance = self._moments(teacher_epsilon, teacher_fraction, draw)
        terms["vb_kd"] = self._vb(
            epsilon.detach(), fraction, draw, true_mean, true_log_variance, draw.x0
        )
        return {"loss_kd": terms["mse_kd"] + terms["vb_kd"], **terms}

    def _moments(
        self, epsilon: Tensor, fraction: Tensor, draw: Draw[Tensor]
    ) -> tuple[Tensor, Tensor]:
        x0 = self.tables.x0_from_epsilon(draw.x_t, draw.t, epsilon)
        return self.tables.posterior_mean(x0, draw.x_t, draw.t), self.tables.log_variance(
            fraction, draw.t, draw.x_t
        )

    def _vb(
        self,
        epsilon: Tensor,
        fraction: Tensor,
        draw: Draw[Tensor],
        true_mean: Tensor,
        true_log_variance: Tensor,
        x0: Tensor,
    ) -> Tensor:
        mean, log_variance = self._moments(epsilon, fraction, draw)
        kl = _mean(gaussian_kl(true_mean, true_log_variance, mean, log_variance)) / math.log(2)
        nll = -_mean(discretized_gaussian_log_likelihood(x0, mean, log_variance / 2)) / math.log(2)
        return torch.where(draw.t == 0, nll, kl) * (self.num_timesteps / 1000)

    # -- sampling -------------------------------------------------------------
    def check_sampling(self, **options: Any) -> None:
        """Raise ValueError for options that `sample` does not accept."""
        GaussianSampling(**options).num_noises(self)

    def num_noises(self, **options: Any) -> int:
        """One per random step of a sampler; one in total for a random diffusers scheduler."""
        return GaussianSampling(**options).num_noises(self)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoises,
        z: Tensor,
        y: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Samples (N, C, H, W) from noise `z`; see `GaussianSampling` and its `sample`."""
        return GaussianSampling(**options).sample(
            self, denoiser, z, y, noise=noise, generator=generator
        )


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the first axis: (N,)."""
    return x.flatten(1).mean(1)
