"""Gaussian diffusion as in ADM and DiT: epsilon prediction, learned-range variance, loss = mse + vb.

Ho et al. 2006.11239 (forward and posterior, equations 4 to 7), Nichol & Dhariwal 2102.09672 (learned variance, equation 15; hybrid loss,
equation 16), Dhariwal & Nichol 2105.05233. Tables are float64; what is gathered from them is float32.
"""

from __future__ import annotations

import math
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.base import Distance, Draw, check_channels, mean_square
from tinyfusion_pl.objectives.likelihood import discretized_gaussian_log_likelihood, gaussian_kl
from tinyfusion_pl.objectives.sampling import check_options, sample_chain
from tinyfusion_pl.objectives.schedulers import check_scheduler, sample_with_scheduler
from tinyfusion_pl.objectives.schedules import NOISE_SCHEDULES


def spaced_timesteps(num_timesteps: int, num_sampling_steps: int) -> Tensor:
    """`num_sampling_steps` of the timesteps, evenly spread from 0 to the last, ascending: int64 (num_sampling_steps,).

    Raises:
        ValueError: for fewer than 1 or more than `num_timesteps` steps.
    """
    if not 1 <= num_sampling_steps <= num_timesteps:
        raise ValueError(f"num_sampling_steps is {num_sampling_steps}; give 1 to {num_timesteps}.")
    if num_sampling_steps == 1:
        return torch.zeros(1, dtype=torch.int64)
    stride = (num_timesteps - 1) / (num_sampling_steps - 1)
    # Added up, not multiplied: published steps round that sum, which differs where a step falls halfway between two timesteps.
    return torch.tensor([round(t) for t in accumulate(repeat(stride, num_sampling_steps - 1), initial=0.0)])


class GaussianTables:
    """What the formulas need of the betas, float64 (T,) each."""

    def __init__(self, betas: Tensor) -> None:
        self.betas = betas
        self.alphas_cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.alphas_cumprod_prev = previous
        self.posterior_variance = betas * (1 - previous) / (1 - self.alphas_cumprod)
        # The first posterior variance is zero; its logarithm is replaced by that of the second.
        clipped = self.posterior_variance.clone()
        clipped[0] = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = clipped.log()
        self.posterior_mean_x0 = betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_xt = (1 - previous) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)

    def at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """`table` at `t` (N,), float32, shaped to broadcast over `like` (N, ...)."""
        return table.float().to(t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def x0_from_epsilon(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        a = self.alphas_cumprod
        return self.at((1 / a).sqrt(), t, x_t) * x_t - self.at((1 / a - 1).sqrt(), t, x_t) * epsilon

    def epsilon_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        a = self.alphas_cumprod
        return (self.at((1 / a).sqrt(), t, x_t) * x_t - x0) / self.at((1 / a - 1).sqrt(), t, x_t)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at(self.posterior_mean_x0, t, x_t) * x0 + self.at(self.posterior_mean_xt, t, x_t) * x_t

    def log_variance(self, fraction: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        """Log-variance between the posterior's and beta at `fraction` in [-1, 1]; without a prediction that of beta."""
        high = self.betas.clone()
        if fraction is None:
            high[0] = self.posterior_variance[1] if len(high) > 1 else high[0]
            return self.at(high.log(), t, like).expand_as(like)
        low, high = self.at(self.posterior_log_variance_clipped, t, like), self.at(high.log(), t, like)
        part = (fraction + 1) / 2
        return part * high + (1 - part) * low


class GaussianDiffusion:
    """The diffusion process, its training and distillation losses, and sampling by DDPM, DDIM and diffusers' schedulers.

    Args:
        num_timesteps: Steps of the forward process, >= 1; > 20 with the linear schedule, whose last beta would reach 1 with fewer.
        noise_schedule: ``"linear"``, ``"cosine"``, or ``"scaled_linear"`` (Stable Diffusion, U-ViT).
        learn_sigma: The denoiser predicts the variance in a second half of its channels.

    Raises:
        ValueError: for an unknown schedule or too few steps.
    """

    sampling_options = staticmethod(check_options)  # has the parameters that `sample` takes

    def __init__(self, *, num_timesteps: int = 1000, noise_schedule: str = "linear", learn_sigma: bool = True) -> None:
        if noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(f"noise_schedule is {noise_schedule!r}; give one of {', '.join(map(repr, NOISE_SCHEDULES))}.")
        if num_timesteps < 1 or not (betas := NOISE_SCHEDULES[noise_schedule](num_timesteps)).max() < 1:
            least = 21 if noise_schedule == "linear" else 1
            raise ValueError(f"num_timesteps is {num_timesteps}, too few for the {noise_schedule} schedule, whose betas must be below 1; "
                             f"give at least {least} (published: 1000).")
        self.num_timesteps, self.learn_sigma = num_timesteps, learn_sigma
        self.tables = GaussianTables(betas)

    def respaced(self, num_sampling_steps: int) -> tuple[GaussianTables, Tensor]:
        """Tables of the process that visits fewer timesteps, and those timesteps (ascending)."""
        timesteps = spaced_timesteps(self.num_timesteps, num_sampling_steps)
        kept = self.tables.alphas_cumprod[timesteps]
        return GaussianTables(1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])), timesteps

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser of another number of channels than learn_sigma says."""
        check_channels(denoiser, expected=2 if self.learn_sigma else 1, objective=f"Gaussian diffusion with learn_sigma={self.learn_sigma}")

    # -- training -----------------------------------------------------------------------------------------------------------------------
    def draw(self, x0: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None) -> Draw:
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, at uniformly random timesteps t (N,) unless given."""
        if t is None:
            t = torch.randint(self.num_timesteps, (len(x0),), device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        a = self.tables.alphas_cumprod
        return Draw(x0, self.tables.at(a.sqrt(), t, x0) * x0 + self.tables.at((1 - a).sqrt(), t, x0) * noise, t, noise)

    def split(self, output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The denoiser's output as epsilon and the variance's place between its bounds (None where it is not learned).

        Raises:
            ValueError: for another number of channels than learn_sigma says.
        """
        channels = like.shape[1] * (2 if self.learn_sigma else 1)
        if output.shape[1] != channels:
            raise ValueError(f"The denoiser gave {output.shape[1]} channels for latents of {like.shape[1]}; with learn_sigma="
                             f"{self.learn_sigma} the objective expects {channels}.")
        return tuple(output.float().chunk(2, 1)) if self.learn_sigma else (output.float(), None)

    def losses(self, output: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Per sample (N,): "mse" of epsilon, "vb" in bits per dimension (mean detached, times T/1000), and their sum "loss"."""
        epsilon, fraction = self.split(output, draw.x_t)
        terms = {"mse": _mean((draw.noise - epsilon).square())}
        if fraction is None:
            return {"loss": terms["mse"], **terms}
        true_mean = self.tables.posterior_mean(draw.x0, draw.x_t, draw.t)
        true_log_variance = self.tables.at(self.tables.posterior_log_variance_clipped, draw.t, draw.x_t)
        terms["vb"] = self._vb(epsilon.detach(), fraction, draw, true_mean, true_log_variance, draw.x0)
        return {"loss": terms["mse"] + terms["vb"], **terms}

    def distillation_losses(self, output: Tensor, teacher_output: Tensor, draw: Draw, *,
                            distance: Distance = mean_square) -> dict[str, Tensor]:
        """Per sample (N,): "mse_kd", the `distance` of the student's epsilon to the teacher's, "vb_kd", the KL divergence in bits
        per dimension of the student's step from the teacher's (the student's mean detached, so that it teaches the variance only), and
        their sum "loss_kd".

        At t = 0 "vb_kd" is the student's likelihood of the data, as "vb" is. Published recovery: 0.9 * "loss_kd" + 0.1 * the "loss" of
        `losses` + 0.01 * the feature loss of `tinyfusion_pl.distill`.
        """
        (epsilon, fraction), (teacher_epsilon, teacher_fraction) = (self.split(o, draw.x_t) for o in (output, teacher_output.detach()))
        terms = {"mse_kd": distance(epsilon, teacher_epsilon)}
        if fraction is None:
            return {"loss_kd": terms["mse_kd"], **terms}
        true_mean, true_log_variance = self._moments(teacher_epsilon, teacher_fraction, draw)
        terms["vb_kd"] = self._vb(epsilon.detach(), fraction, draw, true_mean, true_log_variance, draw.x0)
        return {"loss_kd": terms["mse_kd"] + terms["vb_kd"], **terms}

    def _moments(self, epsilon: Tensor, fraction: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self.tables.x0_from_epsilon(draw.x_t, draw.t, epsilon)
        return self.tables.posterior_mean(x0, draw.x_t, draw.t), self.tables.log_variance(fraction, draw.t, draw.x_t)

    def _vb(self, epsilon: Tensor, fraction: Tensor, draw: Draw, true_mean: Tensor, true_log_variance: Tensor, x0: Tensor) -> Tensor:
        mean, log_variance = self._moments(epsilon, fraction, draw)
        kl = _mean(gaussian_kl(true_mean, true_log_variance, mean, log_variance)) / math.log(2)
        nll = -_mean(discretized_gaussian_log_likelihood(x0, mean, log_variance / 2)) / math.log(2)
        return torch.where(draw.t == 0, nll, kl) * (self.num_timesteps / 1000)

    # -- sampling -----------------------------------------------------------------------------------------------------------------------
    def check_sampling(self, **options: Any) -> None:
        """Raise ValueError for options that `sample` would refuse."""
        (check_scheduler if options.get("sampler") == "diffusers" else check_options)(self, **options)

    def num_noises(self, *, num_sampling_steps: int = 250, sampler: str = "ddpm", eta: float = 0.0, **options: Any) -> int:
        """One for each step where the sampler is random; one in all for a random scheduler of diffusers."""
        if sampler == "diffusers":
            return int(check_scheduler(self, num_sampling_steps=num_sampling_steps, eta=eta, **options))
        return num_sampling_steps if sampler == "ddpm" or eta else 0

    @torch.no_grad()
    def sample(self, denoiser: nn.Module, z: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Samples (N, C, H, W) from noise `z`; see `sample_chain` (sampling) for the options, and for those of ``sampler="diffusers"``
        `sample_with_scheduler` (schedulers)."""
        return (sample_with_scheduler if options.get("sampler") == "diffusers" else sample_chain)(self, denoiser, z, y, **options)


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the first axis: (N,)."""
    return x.flatten(1).mean(1)
