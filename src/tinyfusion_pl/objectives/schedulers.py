"""Sampling a Gaussian diffusion with a scheduler of diffusers: DPM-Solver++, UniPC, Euler and so on."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.objectives.sampling import check_eta, check_guidance, check_noise, given_or_drawn, guided

if TYPE_CHECKING:
    from tinyfusion_pl.objectives.gaussian_diffusion import GaussianDiffusion

LEARNED = ("learned", "learned_range")
MAX_SOLVER_ORDER = 3  # more is taken for 3 by some of diffusers' solvers, and unstable in others
NUM_PROBED_CHANNELS = 5  # more than any scheduler takes for granted


def check_scheduler(objective: GaussianDiffusion, *, scheduler: Any = None, num_sampling_steps: int = 250, eta: float = 0.0,
                    sampler: str = "diffusers", guidance_scale: float = 1.0, guidance_channels: int | None = 3,
                    clip_denoised: bool = False) -> bool:
    """Raise the ValueError that `sample_with_scheduler` would raise for these options (see there).

    Returns:
        Whether the scheduler's steps are random.
    """
    if scheduler is None:
        raise ValueError("sampler is 'diffusers', but there is no scheduler; give one, e.g. diffusers.DPMSolverMultistepScheduler().")
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    ours, theirs = objective.tables.alphas_cumprod, getattr(scheduler, "alphas_cumprod", None)
    if theirs is None or not hasattr(scheduler, "set_timesteps"):
        raise ValueError(f"scheduler is a {name}, which has no noise schedule (alphas_cumprod) of a discrete diffusion. Give one of "
                         "diffusers' schedulers for epsilon prediction, e.g. diffusers.DPMSolverMultistepScheduler().")
    if theirs.shape != ours.shape or not torch.allclose(theirs.double(), ours, rtol=1e-3):
        raise ValueError(f"{name} has another noise schedule than the objective ({len(theirs)} steps that leave {theirs[-1]:.3g} of the "
                         f"signal's variance, instead of {len(ours)} that leave {ours[-1]:.3g}). For the published one build it with "
                         "beta_schedule='linear', beta_start=1e-4, beta_end=0.02; for any with trained_betas.")
    if (prediction := config.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(f"{name} has prediction_type {prediction!r}; the denoiser predicts 'epsilon'.")
    if config.get("variance_type") in LEARNED and not objective.learn_sigma:
        raise ValueError(f"{name} has variance_type {config['variance_type']!r}, but with learn_sigma=False the denoiser predicts no "
                         "variance. Build it with variance_type='fixed_small'.")
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta is {eta}, but {name} has no eta; set it to 0, or give a DDIMScheduler.")
    if clip_denoised:
        raise ValueError("clip_denoised is set, but clipping is the scheduler's own part; build it with clip_sample=True or thresholding.")
    check_eta(eta)
    check_guidance(guidance_channels, guidance_scale)
    if not 1 <= (order := config.get("solver_order", 1)) <= MAX_SOLVER_ORDER:
        raise ValueError(f"{name} has solver_order {order}; give 1 to {MAX_SOLVER_ORDER} (2 where samples are guided).")
    objective.respaced(num_sampling_steps)
    return _is_random(objective, scheduler, num_sampling_steps=num_sampling_steps, eta=eta)


def sample_with_scheduler(objective: GaussianDiffusion, denoiser: nn.Module, z: Tensor, y: Tensor, *, scheduler: Any = None,
                          num_sampling_steps: int = 250, sampler: str = "diffusers", eta: float = 0.0, guidance_scale: float = 1.0,
                          guidance_channels: int | None = 3, noise: Tensor | None = None, generator: torch.Generator | None = None,
                          clip_denoised: bool = False) -> Tensor:
    """Run `scheduler` from `z` (N, C, H, W) with labels `y` (N,); it is copied, not changed.

    Args:
        objective, denoiser: The process and the network, called with the scheduler's timesteps.
        scheduler: One of diffusers' for epsilon prediction, with the objective's noise schedule (diffusers' defaults are the published
            one). A predicted variance is cut off, unless the scheduler's ``variance_type`` is "learned" or "learned_range".
        num_sampling_steps: The scheduler's ``num_inference_steps``, 1 to the process's number; schedulers of a higher order may ask the
            denoiser more often.
        sampler: ``"diffusers"``.
        eta: Noise of a DDIMScheduler, 0 to 1.
        guidance_scale, guidance_channels: See `guided`.
        noise: (1, N, C, H, W), for schedulers whose steps are random: each sample's noises are drawn from a generator that its noise here
            seeds, so that they do not depend on the batch. Default: drawn.
        generator: Where `noise` is drawn from.
        clip_denoised: Must be False: clipping is the scheduler's (``clip_sample``, which some have on by default; ``thresholding``).

    Raises:
        ValueError: for a scheduler of another process, one that cannot step, or one whose noise cannot be fixed.
    """
    is_random = check_scheduler(objective, scheduler=scheduler, num_sampling_steps=num_sampling_steps, eta=eta,
                                guidance_scale=guidance_scale, guidance_channels=guidance_channels, clip_denoised=clip_denoised)
    check_noise(noise, z, num_noises=int(is_random))
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_sampling_steps, device=z.device)
    arguments = _step_arguments(scheduler, eta=eta)
    if is_random:
        arguments["generator"] = [_seeded(of_sample) for of_sample in given_or_drawn(noise, 0, z, generator)]
    x = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = guided(denoiser, scaled, t.to(x.device).expand(len(x)), y, guidance_scale=guidance_scale,
                        guidance_channels=guidance_channels)
        x = scheduler.step(_taken(objective, scheduler, output, x), t, x, **arguments).prev_sample
    return x


def _taken(objective: GaussianDiffusion, scheduler: Any, output: Tensor, x: Tensor) -> Tensor:
    """What `scheduler` takes of the denoiser's output."""
    epsilon, _ = objective.split(output, x)
    return output.float() if scheduler.config.get("variance_type") in LEARNED else epsilon


def _step_arguments(scheduler: Any, *, eta: float) -> dict[str, Any]:
    return {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}


def _seeded(noise: Tensor) -> torch.Generator:
    """A generator on the CPU, whatever the device, seeded with the bits of `noise`'s first two numbers (or its one)."""
    first = noise.flatten()[:2].float().cpu().view(torch.int32).tolist()
    return torch.Generator().manual_seed(sum((bits % 2**32) << (31 * i) for i, bits in enumerate(first)) % 2**63)


def _is_random(objective: GaussianDiffusion, scheduler: Any, *, num_sampling_steps: int, eta: float) -> bool:
    """Whether steps of `scheduler` draw from the generator that they are given, found out on one number a channel.

    Raises:
        ValueError: when it cannot step, or when it draws from anywhere else.
    """
    name, scheduler = type(scheduler).__name__, copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    before, global_before = generator.get_state(), torch.get_rng_state()
    arguments = _step_arguments(scheduler, eta=eta)
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generator
    x = torch.zeros(1, NUM_PROBED_CHANNELS, 1, 1)
    output = torch.zeros(1, NUM_PROBED_CHANNELS * (2 if objective.learn_sigma else 1), 1, 1)
    try:
        scheduler.set_timesteps(num_sampling_steps)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)  # some note there at which step they are
            x = scheduler.step(_taken(objective, scheduler, output, x), t, x, **arguments).prev_sample
        moved = not torch.equal(torch.get_rng_state(), global_before)
    except Exception as error:  # of many types, for a combination of settings that the scheduler's own code does not foresee
        raise ValueError(f"{name} cannot make {num_sampling_steps} steps on a denoiser's output: {error}. Change its settings "
                         "(solver_order, timestep_spacing, variance_type), or take another scheduler.") from error
    finally:
        torch.set_rng_state(global_before)
    if len(scheduler.timesteps) > 1 and scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(f"{name} goes from data to noise; give a scheduler that goes from noise to data.")
    if moved:
        raise ValueError(f"{name} draws noise that cannot be fixed for each sample, so that pictures would depend on the batch. Take a "
                         "deterministic scheduler, or one whose step takes a generator.")
    return not torch.equal(generator.get_state(), before)
