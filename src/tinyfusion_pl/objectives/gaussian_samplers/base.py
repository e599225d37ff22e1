"""Options, registry and base classes of the samplers of Gaussian diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinyfusion_pl.objectives.gaussian_process import GaussianProcess, GaussianTables
from tinyfusion_pl.objectives.guidance import check_guidance, guided
from tinyfusion_pl.objectives.sampling_noise import check_noise, get_noise
from tinyfusion_pl.protocols import Denoises

SAMPLERS: dict[str, Sampler] = {}


@dataclass(frozen=True, kw_only=True)
class GaussianSampling:
    """Options for sampling from a Gaussian diffusion.

    Args:
        num_sampling_steps: Number of evenly spaced timesteps, 1 to the process's number (published:
            250). With ``sampler="diffusers"``, the scheduler's ``num_inference_steps``;
            higher-order schedulers may call the denoiser more often.
        sampler: Name of a registered sampler: ``"ddpm"``, ``"ddim"``, ``"diffusers"``.
        eta: Amount of noise of DDIM, from 0 (none) to 1.
        guidance_scale: See `guided` (published: 1.5 for tables, 4.0 for figures).
        guidance_channels: See `guided` (published: 3).
        clip_denoised: Clip the predicted x0 to [-1, 1]. A diffusers scheduler has its own setting.
        scheduler: With ``sampler="diffusers"``, a diffusers scheduler for epsilon prediction with
            the objective's noise schedule (diffusers' defaults are the published one). It is
            copied, not changed. A predicted variance is dropped unless the scheduler's
            ``variance_type`` is "learned" or "learned_range".

    Raises:
        ValueError: For settings out of range or a combination that is not supported.
    """

    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    eta: float = 0.0
    guidance_scale: float = 1.0
    guidance_channels: int | None = 3
    clip_denoised: bool = False
    scheduler: Any = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"sampler is {self.sampler!r}; give one of {', '.join(map(repr, SAMPLERS))}."
            )
        check_guidance(self.guidance_channels, self.guidance_scale)
        if self.scheduler is not None and not SAMPLERS[self.sampler].takes_scheduler:
            raise ValueError(
                f"A scheduler is given, but sampler {self.sampler!r} does not use one; set "
                "sampler='diffusers'."
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; give a number in [0, 1].")

    def num_noises(self, process: GaussianProcess) -> int:
        """Number of noise tensors that `sample` takes.

        Raises:
            ValueError: For options that do not fit `process`.
        """
        return SAMPLERS[self.sampler].num_noises(process, self)

    def sample(
        self,
        process: GaussianProcess,
        denoiser: Denoises,
        z: Tensor,
        y: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Run the reverse process from `z` (N, C, H, W) with labels `y` (N,).

        Args:
            process: The diffusion process.
            denoiser: The network; called with the original timesteps.
            z: Noise (N, C, H, W).
            y: Labels (N,).
            noise: (num_noises, N, C, H, W), noisiest step first; default: drawn.
            generator: Source of the noise; it may be on another device than `z`.

        Raises:
            ValueError: For options that do not fit `process`, or noise of the wrong shape.
        """
        return SAMPLERS[self.sampler].sample(
            process, denoiser, z, y, self, noise=noise, generator=generator
        )


class Sampler(ABC):
    """A method that turns noise into data."""

    takes_scheduler: ClassVar[bool] = False

    @abstractmethod
    def num_noises(self, process: GaussianProcess, options: GaussianSampling) -> int:
        """See `GaussianSampling.num_noises`."""

    @abstractmethod
    def sample(
        self,
        process: GaussianProcess,
        denoiser: Denoises,
        z: Tensor,
        y: Tensor,
        options: GaussianSampling,
        *,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """See `GaussianSampling.sample`."""


class StepSampler(Sampler):
    """A sampler that visits respaced timesteps once each; subclasses define the step."""

    @abstractmethod
    def is_random(self, options: GaussianSampling) -> bool:
        """Whether steps draw noise."""

    @abstractmethod
    def step(
        self,
        tables: GaussianTables,
        x: Tensor,
        t: Tensor,
        x0: Tensor,
        fraction: Tensor | None,
        options: GaussianSampling,
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next, less noisy x.

        Args:
            tables: Tables of the respaced process.
            x: Noised data (N, C, H, W).
            t: Indices of the respaced timesteps (N,).
            x0: Predicted data, clipped with `clip_denoised`.
            fraction: Predicted place of the log-variance between its bounds, in [-1, 1]; None if
                the variance is not learned.
            options: The sampling options.
        """

    def num_noises(self, process: GaussianProcess, options: GaussianSampling) -> int:
        """One per step for a random sampler, else 0."""
        process.respaced(options.num_sampling_steps)
        return options.num_sampling_steps if self.is_random(options) else 0

    def sample(
        self,
        process: GaussianProcess,
        denoiser: Denoises,
        z: Tensor,
        y: Tensor,
        options: GaussianSampling,
        *,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Run all steps; see `GaussianSampling.sample`."""
        tables, timesteps = process.respaced(options.num_sampling_steps)
        check_noise(noise, z, num_noises=options.num_sampling_steps)
        x = z
        for i, step in enumerate(reversed(range(options.num_sampling_steps))):
            t = torch.full((len(x),), step, device=x.device)
            output = guided(
                denoiser,
                x,
                timesteps[step].to(x.device).expand(len(x)),
                y,
                guidance_scale=options.guidance_scale,
                guidance_channels=options.guidance_channels,
            )
            epsilon, fraction = process.split(output, x)
            x0 = tables.x0_from_epsilon(x, t, epsilon)
            if options.clip_denoised:
                x0 = x0.clamp(-1, 1)
            mean, deviation = self.step(tables, x, t, x0, fraction, options)
            if step > 0 and self.is_random(options):
                x = mean + deviation * get_noise(noise, i, x, generator)
            else:
                x = mean
        return x


def register_sampler(name: str) -> Callable[[type[Sampler]], type[Sampler]]:
    """Register a `Sampler` class as ``sampler=name``.

    Raises:
        ValueError: If the name is taken.
    """

    def register(cls: type[Sampler]) -> type[Sampler]:
        if name in SAMPLERS:
            raise ValueError(f"A sampler named {name!r} already exists. Give another name.")
        SAMPLERS[name] = cls()
        return cls

    return register
