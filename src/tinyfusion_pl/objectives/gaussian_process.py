"""The forward process of Gaussian diffusion: noise schedules, their tables, and respacing.

Ho et al. 2006.11239 (forward and posterior, equations 4 to 7), Nichol & Dhariwal 2102.09672
(learned variance, equation 15). Tables are float64; values gathered from them are float32.
"""

from __future__ import annotations

import math
from itertools import accumulate, repeat

import torch
from torch import Tensor


def scaled_linear_betas(num_timesteps: int) -> Tensor:
    """Stable Diffusion's noise variances: float64 (num_timesteps,).

    Their square roots are evenly spaced from sqrt(8.5e-4) to sqrt(0.012), whatever the count.
    Rombach et al. 2112.10752; U-ViT (2209.12152) was trained with them.
    """
    return torch.linspace(8.5e-4**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64).square()


def linear_betas(num_timesteps: int) -> Tensor:
    """Noise variances from 1e-4 to 0.02 at 1000 steps, scaled for other counts: float64 (T,)."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Noise variances whose signal follows a squared cosine, at most 0.999: float64 (T,).

    Nichol & Dhariwal, equation 17.
    """
    steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = ((steps + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - signal[1:] / signal[:-1]).clamp_max(0.999)


NOISE_SCHEDULES = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "scaled_linear": scaled_linear_betas,
}


def spaced_timesteps(num_timesteps: int, num_sampling_steps: int) -> Tensor:
    """Evenly spaced timesteps from 0 to the last, ascending: int64 (num_sampling_steps,).

    Raises:
        ValueError: For fewer than 1 or more than `num_timesteps` steps.
    """
    if not 1 <= num_sampling_steps <= num_timesteps:
        raise ValueError(f"num_sampling_steps is {num_sampling_steps}; give 1 to {num_timesteps}.")
    if num_sampling_steps == 1:
        return torch.zeros(1, dtype=torch.int64)
    stride = (num_timesteps - 1) / (num_sampling_steps - 1)
    # A running sum, not a product: the published steps round that sum, which differs where a step
    # falls halfway between two timesteps.
    steps = accumulate(repeat(stride, num_sampling_steps - 1), initial=0.0)
    return torch.tensor([round(t) for t in steps])


class GaussianTables:
    """Tables computed from the betas, float64 (T,) each."""

    def __init__(self, betas: Tensor) -> None:
        self.betas = betas
        self.alphas_cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.alphas_cumprod_prev = previous
        self.posterior_variance = betas * (1 - previous) / (1 - self.alphas_cumprod)
        # The first posterior variance is zero; use the logarithm of the second.
        clipped = self.posterior_variance.clone()
        clipped[0] = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = clipped.log()
        self.posterior_mean_x0 = betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_xt = (1 - previous) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)

    def at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """`table` at `t` (N,), float32, shaped to broadcast over `like` (N, ...)."""
        return table.float().to(t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def x0_from_epsilon(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """The data that `epsilon` predicts at `x_t`."""
        a = self.alphas_cumprod
        return self.at((1 / a).sqrt(), t, x_t) * x_t - self.at((1 / a - 1).sqrt(), t, x_t) * epsilon

    def epsilon_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise in `x_t` when the data is `x0`."""
        a = self.alphas_cumprod
        return (self.at((1 / a).sqrt(), t, x_t) * x_t - x0) / self.at((1 / a - 1).sqrt(), t, x_t)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0)."""
        return (
            self.at(self.posterior_mean_x0, t, x_t) * x0
            + self.at(self.posterior_mean_xt, t, x_t) * x_t
        )

    def log_variance(self, fraction: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        """Log-variance at `fraction` in [-1, 1] between the posterior's and that of beta.

        None: that of beta.
        """
        high = self.betas.clone()
        if fraction is None:
            high[0] = self.posterior_variance[1] if len(high) > 1 else high[0]
            return self.at(high.log(), t, like).expand_as(like)
        low, high = (
            self.at(self.posterior_log_variance_clipped, t, like),
            self.at(high.log(), t, like),
        )
        part = (fraction + 1) / 2
        return part * high + (1 - part) * low


class GaussianProcess:
    """A discrete Gaussian diffusion, and how to read the denoiser's output.

    Args:
        num_timesteps: Steps of the forward process, >= 1; > 20 with the linear schedule, whose last
            beta reaches 1 with fewer.
        noise_schedule: ``"linear"``, ``"cosine"``, or ``"scaled_linear"`` (Stable Diffusion,
            U-ViT).
        learn_sigma: Whether the denoiser predicts the variance in the second half of its channels.

    Raises:
        ValueError: For an unknown schedule or too few steps.
    """

    def __init__(
        self, *, num_timesteps: int = 1000, noise_schedule: str = "linear", learn_sigma: bool = True
    ) -> None:
        if noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(
                f"noise_schedule is {noise_schedule!r}; give one of "
                f"{', '.join(map(repr, NOISE_SCHEDULES))}."
            )
        if (
            num_timesteps < 1
            or not (betas := NOISE_SCHEDULES[noise_schedule](num_timesteps)).max() < 1
        ):
            least = 21 if noise_schedule == "linear" else 1
            raise ValueError(
                f"num_timesteps is {num_timesteps}, too few for the {noise_schedule} schedule, "
                f"whose betas must be below 1; give at least {least} (published: 1000)."
            )
        self.num_timesteps, self.learn_sigma = num_timesteps, learn_sigma
        self.tables = GaussianTables(betas)

    def respaced(self, num_sampling_steps: int) -> tuple[GaussianTables, Tensor]:
        """Tables of the process that visits fewer timesteps, and these timesteps (ascending)."""
        timesteps = spaced_timesteps(self.num_timesteps, num_sampling_steps)
        kept = self.tables.alphas_cumprod[timesteps]
        return GaussianTables(1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])), timesteps

    def split(self, output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the denoiser's output into epsilon and the variance's place between its bounds.

        The second is None if the variance is not learned.

        Raises:
            ValueError: If the number of channels does not match `learn_sigma`.
        """
        channels = like.shape[1] * (2 if self.learn_sigma else 1)
        if output.shape[1] != channels:
            raise ValueError(
                f"The denoiser returned {output.shape[1]} channels for {like.shape[1]}-channel "
                f"latents; with learn_sigma={self.learn_sigma} the objective expects {channels}."
            )
        if not self.learn_sigma:
            return output.float(), None
        epsilon, fraction = output.float().chunk(2, 1)
        return epsilon, fraction
