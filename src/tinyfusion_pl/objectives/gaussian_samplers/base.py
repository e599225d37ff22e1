"""What samplers of Gaussian diffusion share: options, a registry, and the loop of those that step through respaced timesteps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.gaussian_process import GaussianProcess, GaussianTables
from tinyfusion_pl.objectives.guidance import check_guidance, guided
from tinyfusion_pl.objectives.sampling_noise import check_noise, given_or_drawn

SAMPLERS: dict[str, Sampler] = {}


@dataclass(frozen=True, kw_only=True)
class GaussianSampling:
    """How a Gaussian diffusion is sampled.

    Args:
        num_sampling_steps: Timesteps visited, evenly spread, 1 to the process's number (published: 250). With ``sampler="diffusers"`` the
            scheduler's ``num_inference_steps``; schedulers of a higher order may call the denoiser more often.
        sampler: A name in `SAMPLERS`: ``"ddpm"``, ``"ddim"``, ``"diffusers"``.
        eta: Noise of DDIM, 0 (none) to 1.
        guidance_scale, guidance_channels: See `guided` (published: 1.5 for tables, 4.0 for shown images; 3 channels).
        clip_denoised: Clip predicted x0 to [-1, 1]. Clipping by a scheduler is the scheduler's own setting.
        scheduler: With ``sampler="diffusers"``, one of diffusers' for epsilon prediction, with the objective's noise schedule (diffusers'
            defaults are the published one). It is copied, not changed. A predicted variance is cut off, unless the scheduler's
            ``variance_type`` is "learned" or "learned_range".

    Raises:
        ValueError: for settings out of range, or that do not go together.
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
                f"There is a scheduler, but sampler is {self.sampler!r}, which does not use it; set sampler to 'diffusers'."
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; give a number in [0, 1].")

    def num_noises(self, process: GaussianProcess) -> int:
        """How many noise tensors sampling `process` takes.

        Raises:
            ValueError: for options that `process` cannot be sampled with.
        """
        return SAMPLERS[self.sampler].num_noises(process, self)

    def sample(
        self,
        process: GaussianProcess,
        denoiser: nn.Module,
        z: Tensor,
        y: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Run the reverse process from `z` (N, C, H, W) with labels `y` (N,).

        Args:
            process, denoiser: The process, and the network, called with the original timestep numbers.
            noise: (num_noises, N, C, H, W), the first for the noisiest step; default: drawn.
            generator: Where noise is drawn from; its device may be another than that of `z`.

        Raises:
            ValueError: for options that `process` cannot be sampled with, or noise of another shape.
        """
        return SAMPLERS[self.sampler].sample(
            process, denoiser, z, y, self, noise=noise, generator=generator
        )


class Sampler(ABC):
    """A way from noise to data."""

    takes_scheduler: ClassVar[bool] = False

    @abstractmethod
    def num_noises(self, process: GaussianProcess, options: GaussianSampling) -> int:
        """See `GaussianSampling.num_noises`."""

    @abstractmethod
    def sample(
        self,
        process: GaussianProcess,
        denoiser: nn.Module,
        z: Tensor,
        y: Tensor,
        options: GaussianSampling,
        *,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """See `GaussianSampling.sample`."""


class StepSampler(Sampler):
    """A sampler that visits respaced timesteps once each: a subclass says where a step goes, and how random it is."""

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
            tables: Of the respaced process.
            x: (N, C, H, W).
            t: (N,), places among the respaced timesteps.
            x0: The prediction of the data, clipped where that is asked for.
            fraction: The predicted place of the log-variance between its bounds, in [-1, 1]; None where it is not learned.
            options: Of the sampling.
        """

    def num_noises(self, process: GaussianProcess, options: GaussianSampling) -> int:
        process.respaced(options.num_sampling_steps)
        return options.num_sampling_steps if self.is_random(options) else 0

    def sample(
        self,
        process: GaussianProcess,
        denoiser: nn.Module,
        z: Tensor,
        y: Tensor,
        options: GaussianSampling,
        *,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        tables, timesteps = process.respaced(options.num_sampling_steps)
        check_noise(noise, z, num_noises=options.num_sampling_steps)
        x = z
        for i, step in enumerate(reversed(range(options.num_sampling_steps))):
            t = torch.full((len(x),), step, device=x.device)
            output = guided(denoiser, x, timesteps[step].to(x.device).expand(len(x)), y, guidance_scale=options.guidance_scale,
                            guidance_channels=options.guidance_channels)  # fmt: skip
            epsilon, fraction = process.split(output, x)
            x0 = tables.x0_from_epsilon(x, t, epsilon)
            if options.clip_denoised:
                x0 = x0.clamp(-1, 1)
            mean, deviation = self.step(tables, x, t, x0, fraction, options)
            if step > 0 and self.is_random(options):
                x = mean + deviation * given_or_drawn(noise, i, x, generator)
            else:
                x = mean
        return x


def register_sampler(name: str) -> Callable[[type[Sampler]], type[Sampler]]:
    """Make a `Sampler` available as ``sampler=name``.

    Raises:
        ValueError: where the name is taken.
    """

    def register(cls: type[Sampler]) -> type[Sampler]:
        if name in SAMPLERS:
            raise ValueError(f"A sampler is called {name!r} already. Give another name.")
        SAMPLERS[name] = cls()
        return cls

    return register
