"""Sampling with diffusers' schedulers: DPM-Solver++, UniPC, Euler and others."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.objectives.gaussian_process import GaussianProcess
from tinyfusion_pl.objectives.gaussian_samplers.base import (
    GaussianSampling,
    Sampler,
    register_sampler,
)
from tinyfusion_pl.objectives.guidance import guided
from tinyfusion_pl.objectives.sampling_noise import check_noise, get_noise
from tinyfusion_pl.protocols import Denoises

LEARNED = ("learned", "learned_range")
MAX_SOLVER_ORDER = 3  # some diffusers solvers treat more as 3, others are unstable
NUM_PROBED_CHANNELS = 5  # more than any scheduler assumes


@register_sampler("diffusers")
class DiffusersSampler(Sampler):
    """The steps of ``options.scheduler``, at its own timesteps.

    For schedulers with random steps, noise is (1, N, C, H, W) and seeds one generator per sample,
    so that samples do not depend on the batch.
    """

    takes_scheduler = True

    def num_noises(self, process: GaussianProcess, options: GaussianSampling) -> int:
        """1 for a scheduler with random steps, else 0.

        Raises:
            ValueError: For a scheduler of another process, one that cannot step, or one whose noise
                cannot be fixed.
        """
        scheduler = options.scheduler
        if scheduler is None:
            raise ValueError(
                "sampler is 'diffusers', but scheduler is None; give a scheduler, e.g. "
                "diffusers.DPMSolverMultistepScheduler()."
            )
        name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
        ours, theirs = process.tables.alphas_cumprod, getattr(scheduler, "alphas_cumprod", None)
        if theirs is None or not hasattr(scheduler, "set_timesteps"):
            raise ValueError(
                f"scheduler is a {name}, which has no discrete noise schedule (alphas_cumprod). "
                "Give one of diffusers' schedulers for epsilon prediction, e.g. "
                "diffusers.DPMSolverMultistepScheduler()."
            )
        if theirs.shape != ours.shape or not torch.allclose(theirs.double(), ours, rtol=1e-3):
            raise ValueError(
                f"The noise schedule of {name} differs from the objective's: {len(theirs)} steps "
                f"with a final alphas_cumprod of {theirs[-1]:.3g}, not {len(ours)} with "
                f"{ours[-1]:.3g}. For the published schedule set beta_schedule='linear', "
                "beta_start=1e-4, beta_end=0.02; for any other set trained_betas."
            )
        if (prediction := config.get("prediction_type", "epsilon")) != "epsilon":
            raise ValueError(
                f"{name} has prediction_type {prediction!r}; the denoiser predicts 'epsilon'."
            )
        if config.get("variance_type") in LEARNED and not process.learn_sigma:
            raise ValueError(
                f"{name} has variance_type {config['variance_type']!r}, but with "
                "learn_sigma=False the denoiser predicts no variance. Set "
                "variance_type='fixed_small'."
            )
        if options.eta and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(
                f"eta is {options.eta}, but {name} has no eta; set eta=0, or give a DDIMScheduler."
            )
        if options.clip_denoised:
            raise ValueError(
                "clip_denoised is set, but the scheduler does its own clipping; set "
                "clip_sample=True or thresholding=True in the scheduler."
            )
        if not 1 <= (order := config.get("solver_order", 1)) <= MAX_SOLVER_ORDER:
            raise ValueError(
                f"{name} has solver_order {order}; give 1 to {MAX_SOLVER_ORDER} (2 with guidance)."
            )
        process.respaced(options.num_sampling_steps)
        return int(_is_random(process, options))

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
        """Run the scheduler; see `GaussianSampling.sample`."""
        is_random = self.num_noises(process, options)
        check_noise(noise, z, num_noises=is_random)
        scheduler = copy.deepcopy(options.scheduler)
        scheduler.set_timesteps(options.num_sampling_steps, device=z.device)
        arguments = _step_arguments(scheduler, eta=options.eta)
        if is_random:
            arguments["generator"] = [
                _seeded(of_sample) for of_sample in get_noise(noise, 0, z, generator)
            ]
        x = z * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            output = guided(
                denoiser,
                scaled,
                t.to(x.device).expand(len(x)),
                y,
                guidance_scale=options.guidance_scale,
                guidance_channels=options.guidance_channels,
            )
            x = scheduler.step(
                _select(process, scheduler, output, x), t, x, **arguments
            ).prev_sample
        return x


def _select(process: GaussianProcess, scheduler: Any, output: Tensor, x: Tensor) -> Tensor:
    """The part of the denoiser's output that `scheduler` uses."""
    epsilon, _ = process.split(output, x)
    return output.float() if scheduler.config.get("variance_type") in LEARNED else epsilon


def _step_arguments(scheduler: Any, *, eta: float) -> dict[str, Any]:
    return {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}


def _seeded(noise: Tensor) -> torch.Generator:
    """A CPU generator seeded with the bits of the first two numbers of `noise`, or its only one."""
    first = noise.flatten()[:2].float().cpu().view(torch.int32).tolist()
    return torch.Generator().manual_seed(
        sum((bits % 2**32) << (31 * i) for i, bits in enumerate(first)) % 2**63
    )


def _is_random(process: GaussianProcess, options: GaussianSampling) -> bool:
    """Whether the scheduler's steps draw from a generator; runs it on one number per channel.

    Raises:
        ValueError: If it cannot step, or draws from the global generator.
    """
    name, scheduler = type(options.scheduler).__name__, copy.deepcopy(options.scheduler)
    num_sampling_steps = options.num_sampling_steps
    generator = torch.Generator().manual_seed(0)
    before, global_before = generator.get_state(), torch.get_rng_state()
    arguments = _step_arguments(scheduler, eta=options.eta)
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generator
    x = torch.zeros(1, NUM_PROBED_CHANNELS, 1, 1)
    output = torch.zeros(1, NUM_PROBED_CHANNELS * (2 if process.learn_sigma else 1), 1, 1)
    try:
        scheduler.set_timesteps(num_sampling_steps)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)  # some schedulers track the step here
            x = scheduler.step(
                _select(process, scheduler, output, x), t, x, **arguments
            ).prev_sample
        moved = not torch.equal(torch.get_rng_state(), global_before)
    except Exception as error:  # any type: schedulers do not check their settings
        raise ValueError(
            f"{name} failed to run {num_sampling_steps} steps on a denoiser's output: {error}. "
            "Change its settings (solver_order, timestep_spacing, variance_type), or use another "
            "scheduler."
        ) from error
    finally:
        torch.set_rng_state(global_before)
    if len(scheduler.timesteps) > 1 and scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(
            f"{name} steps from data to noise; give a scheduler that steps from noise to data."
        )
    if moved:
        raise ValueError(
            f"{name} draws noise from the global generator, so images would depend on the batch. "
            "Use a deterministic scheduler, or one whose step takes a generator."
        )
    return not torch.equal(generator.get_state(), before)
