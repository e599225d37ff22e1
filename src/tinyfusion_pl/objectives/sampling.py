"""DDPM and DDIM over respaced timesteps, with classifier-free guidance (Ho 2006.11239; Song 2010.02502, equation 12; Ho 2207.12598)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tinyfusion_pl.objectives.gaussian_diffusion import GaussianDiffusion

SAMPLERS = ("ddpm", "ddim", "diffusers")


def guided(denoiser: nn.Module, x: Tensor, t: Tensor, y: Tensor, *, guidance_scale: float, guidance_channels: int | None) -> Tensor:
    """The denoiser's output with classifier-free guidance: e + (s - 1)(e - e_null) in the first `guidance_channels` channels.

    Args:
        denoiser: Its ``num_classes`` is the null label.
        x, t, y: (N, C, H, W), (N,), (N,).
        guidance_scale: s >= 0. 1 is no guidance, and runs the batch once; 0 is the null label alone. DiT's and SiT's scripts count
            alike; U-ViT's ``cfg.sample.scale`` is s - 1 (its 0.4 is 1.4 here).
        guidance_channels: Channels that are guided (published: 3); None or more than there are: all C of the prediction.
    """
    if guidance_scale == 1:
        return denoiser(x, t, y)
    null = torch.full_like(y, denoiser.num_classes)
    conditional, unconditional = denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    k = x.shape[1] if guidance_channels is None else min(guidance_channels, x.shape[1])
    mixed = unconditional[:, :k] + guidance_scale * (conditional[:, :k] - unconditional[:, :k])
    return torch.cat([mixed, conditional[:, k:]], 1)


def check_guidance(guidance_channels: int | None, guidance_scale: float = 1.0) -> None:
    """`ValueError` for a scale or a number of guided channels that `guided` has no meaning for."""
    if not (isinstance(guidance_scale, (int, float)) and math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale is {guidance_scale}; give a finite number >= 0: 1 is no guidance, 0 ignores the labels "
                         "(published: 1.5).")
    if guidance_channels is not None and guidance_channels < 1:
        raise ValueError(f"guidance_channels is {guidance_channels}; give at least 1 (published: 3), or null for all.")


def check_eta(eta: float) -> None:
    """`ValueError` unless `eta` is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; give a number in [0, 1].")


def check_noise(noise: Tensor | None, z: Tensor, *, num_noises: int) -> None:
    """`ValueError` unless `noise`, where given, is `num_noises` tensors of the shape of `z`."""
    if noise is not None and noise.shape != (expected := (num_noises, *z.shape)):
        raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {tuple(expected)} (steps, then the shape of z).")


def given_or_drawn(noise: Tensor | None, i: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """``noise[i]``, or standard normal noise in the shape of `x`, drawn where the generator is."""
    if noise is not None:
        return noise[i]
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def check_options(objective: GaussianDiffusion, *, num_sampling_steps: int = 250, sampler: str = "ddpm", eta: float = 0.0,
                  guidance_scale: float = 1.0, guidance_channels: int | None = 3, clip_denoised: bool = False,
                  scheduler: Any = None) -> None:
    """Raise the ValueError that `sample_chain` would raise for these options (see there)."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; give one of {', '.join(map(repr, SAMPLERS))}.")
    check_guidance(guidance_channels, guidance_scale)
    if scheduler is not None:
        raise ValueError(f"There is a scheduler, but sampler is {sampler!r}, which does not use it; set sampler to 'diffusers'.")
    check_eta(eta)
    objective.respaced(num_sampling_steps)


def sample_chain(objective: GaussianDiffusion, denoiser: nn.Module, z: Tensor, y: Tensor, *, num_sampling_steps: int = 250,
                 sampler: str = "ddpm", eta: float = 0.0, guidance_scale: float = 1.0, guidance_channels: int | None = 3,
                 noise: Tensor | None = None, generator: torch.Generator | None = None, clip_denoised: bool = False) -> Tensor:
    """Run the reverse process from `z` (N, C, H, W) with labels `y` (N,).

    Args:
        objective, denoiser: The process and the network, called with the original timestep numbers.
        num_sampling_steps: Timesteps visited, evenly spread, 1 to the process's number (published: 250).
        sampler: ``"ddpm"`` or ``"ddim"`` (``"diffusers"`` is `sample_with_scheduler`'s).
        eta: Noise of DDIM, 0 (none) to 1.
        guidance_scale, guidance_channels: See `guided` (published: 1.5 for tables, 4.0 for pictures; 3 channels).
        noise: (num_sampling_steps, N, C, H, W), the first for the noisiest step; default: drawn.
        generator: Where noise is drawn from; its device may be another than that of `z`.
        clip_denoised: Clip predicted x0 to [-1, 1].

    Raises:
        ValueError: for settings out of range or noise of another shape.
    """
    check_options(objective, num_sampling_steps=num_sampling_steps, sampler=sampler, eta=eta, guidance_scale=guidance_scale,
                  guidance_channels=guidance_channels)
    tables, timesteps = objective.respaced(num_sampling_steps)
    check_noise(noise, z, num_noises=num_sampling_steps)
    x = z
    for i, step in enumerate(reversed(range(num_sampling_steps))):
        t = torch.full((len(x),), step, device=x.device)
        output = guided(denoiser, x, timesteps[step].to(x.device).expand(len(x)), y, guidance_scale=guidance_scale,
                        guidance_channels=guidance_channels)
        epsilon, fraction = objective.split(output, x)
        x0 = tables.x0_from_epsilon(x, t, epsilon)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        if sampler == "ddpm":
            mean = tables.posterior_mean(x0, x, t)
            deviation = (0.5 * tables.log_variance(fraction, t, x)).exp()
        else:
            a, before = tables.at(tables.alphas_cumprod, t, x), tables.at(tables.alphas_cumprod_prev, t, x)
            epsilon = tables.epsilon_from_x0(x, t, x0)  # of the clipped x0
            deviation = eta * ((1 - before) / (1 - a)).sqrt() * (1 - a / before).sqrt()
            # Never negative but for rounding, which would give NaN at eta 1 and few steps.
            direction = (1 - before - deviation**2).clamp_min(0).sqrt()
            mean = x0 * before.sqrt() + direction * epsilon
        if step > 0 and (sampler == "ddpm" or eta > 0):
            x = mean + deviation * given_or_drawn(noise, i, x, generator)
        else:
            x = mean
    return x
