"""MAR's sampler: tokens in random order, some per iteration, each by reverse diffusion.

Li et al., arXiv 2406.11838, sections 3.2 and 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from tinyfusion_pl.models.mar import put, take
from tinyfusion_pl.objectives.gaussian_process import GaussianProcess
from tinyfusion_pl.objectives.gaussian_samplers import GaussianSampling
from tinyfusion_pl.objectives.guidance import check_guidance
from tinyfusion_pl.protocols import Denoises

GUIDANCE_SCHEDULES = ("linear", "constant")


def to_tokens(latents: Tensor) -> Tensor:
    """Latents (N, C, H, W) as tokens (N, H*W, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def masked_counts(num_tokens: int, num_iterations: int) -> list[int]:
    """Number of tokens still masked after each iteration.

    floor(L cos(pi/2 * (i + 1)/I)), at least one fewer each time, 0 at the end. With more iterations
    than tokens, there is one per token.
    """
    counts, left = [], num_tokens
    for i in range(num_iterations - 1):
        if left == 1:
            break
        cosine = math.cos(math.pi / 2 * (i + 1) / num_iterations)
        left = max(1, min(left - 1, math.floor(num_tokens * cosine)))
        counts.append(left)
    return [*counts, 0]


def guidance_at(
    num_masked: int, num_tokens: int, *, guidance_scale: float, guidance_schedule: str
) -> float:
    """Guidance scale of an iteration after which `num_masked` tokens remain masked.

    It grows with the share of known tokens, or is constant.
    """
    if guidance_schedule == "constant":
        return guidance_scale
    # As published, the last iteration counts one token as masked.
    return 1 + (guidance_scale - 1) * (num_tokens - max(1, num_masked)) / num_tokens


@dataclass(frozen=True, kw_only=True)
class MaskedSampling:
    """Options for sampling tokens.

    Args:
        num_iterations: Iterations, >= 1; with as many as tokens or more, one token at a time
            (published: 256).
        num_sampling_steps: Diffusion steps per token, 1 to the process's number (published: 100).
        guidance_scale: Scale of classifier-free guidance in the head's noise prediction; 1 disables
            it (published: 3.0).
        guidance_schedule: ``"linear"``, from 1 to `guidance_scale` as the share of known tokens
            grows; or ``"constant"``.
        temperature: Factor of the noise of the diffusion steps, >= 0 (published: 1).

    Raises:
        ValueError: For settings out of range.
    """

    num_iterations: int = 256
    num_sampling_steps: int = 100
    guidance_scale: float = 1.0
    guidance_schedule: str = "linear"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(
                f"num_iterations is {self.num_iterations}; give a count >= 1 (published: 256)."
            )
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"guidance_schedule is {self.guidance_schedule!r}; give one of "
                f"{', '.join(map(repr, GUIDANCE_SCHEDULES))}."
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature is {self.temperature}; give a number >= 0 (published: 1)."
            )
        check_guidance(None, self.guidance_scale)

    @property
    def num_noises(self) -> int:
        """One per diffusion step of a token, and one for the order of tokens."""
        return self.num_sampling_steps + 1


def sample_tokens(
    process: GaussianProcess,
    denoiser: Denoises,
    z: Tensor,
    y: Tensor,
    options: MaskedSampling,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample latents (N, C, H, W) token by token.

    Each iteration runs encoder and decoder once, then the reverse diffusion with the head for the
    tokens of this iteration, as many in each sample. A sample depends on its own noise only, not on
    the batch.

    Args:
        process: Diffusion process of the tokens.
        denoiser: A `MAR`, called through its ``encode``, ``decode`` and ``head``.
        z: (N, C, H, W), the initial noise of the token at each position.
        y: Labels (N,).
        options: See `MaskedSampling`.
        noise: (num_sampling_steps + 1, N, C, H, W): the noise of the steps at each position,
            noisiest step first, then one tensor whose first channel gives the order (smallest
            values last). Default: drawn.
        generator: Source of the noise; it may be on another device than `z`.

    Raises:
        ValueError: For more steps than the process has, noise of the wrong shape, or a denoiser
            that is not a MAR.
    """
    process.respaced(options.num_sampling_steps)
    if missing := [name for name in ("encode", "decode", "head") if not hasattr(denoiser, name)]:
        raise ValueError(
            f"The denoiser has no {', '.join(missing)}: MAR's sampler needs a MAR. Set the "
            "objective that the denoiser was trained with."
        )
    expected = (options.num_noises, *z.shape)
    if noise is None:
        device = z.device if generator is None else generator.device
        noise = torch.randn(expected, generator=generator, device=device, dtype=z.dtype).to(
            z.device
        )
    elif noise.shape != expected:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; expected {expected} (steps and one for the "
            "order, then the shape of z)."
        )
    mar = cast(_MAR, denoiser)
    n, c, *_ = z.shape
    start = to_tokens(z)  # (N, L, C)
    step_noise = noise[:-1].flatten(3).transpose(2, 3)  # (S, N, L, C)
    order = noise[-1, :, 0].flatten(1).argsort(1)  # (N, L)
    tokens, num_tokens = torch.zeros_like(start), start.shape[1]
    num_masked = num_tokens
    for num_left in masked_counts(num_tokens, options.num_iterations):
        visible, turn = order[:, num_masked:], order[:, num_left:num_masked]  # (N, V), (N, K)
        scale = guidance_at(
            num_left,
            num_tokens,
            guidance_scale=options.guidance_scale,
            guidance_schedule=options.guidance_schedule,
        )
        head = _Head(mar, tokens, visible, turn, y, with_null=scale != 1)
        places = turn[None, ..., None].expand(len(step_noise), -1, -1, c)  # (S, N, K, C)
        turn_noise = step_noise.gather(2, places).flatten(1, 2)  # (S, N*K, C)
        steps = GaussianSampling(
            num_sampling_steps=options.num_sampling_steps,
            guidance_scale=scale,
            guidance_channels=None,
        )
        sampled = steps.sample(
            process,
            head,
            take(start, turn).flatten(0, 1),
            y.repeat_interleave(turn.shape[1]),
            noise=options.temperature * turn_noise,
        )  # (N*K, C)
        tokens = put(tokens, turn, sampled.view(n, -1, c))  # (N, L, C)
        num_masked = num_left
    return tokens.transpose(1, 2).reshape(z.shape)  # (N, C, H, W)


class _MAR(Protocol):
    """The parts of a MAR that sampling calls."""

    @property
    def num_classes(self) -> int: ...
    def encode(self, tokens: Tensor, visible: Tensor, y: Tensor) -> Tensor: ...
    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor: ...
    def head(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor: ...


class _Head:
    """A MAR's head as a denoiser whose samples are the tokens of one iteration.

    Runs the transformer once, on construction; with guidance on the batch followed by the same
    batch with the null label, in the order of `guided`.
    """

    def __init__(
        self,
        denoiser: _MAR,
        tokens: Tensor,
        visible: Tensor,
        turn: Tensor,
        y: Tensor,
        *,
        with_null: bool,
    ) -> None:
        self.denoiser, self.num_classes = denoiser, denoiser.num_classes
        if with_null:
            tokens, visible, turn = (torch.cat([part, part]) for part in (tokens, visible, turn))
            y = torch.cat([y, torch.full_like(y, self.num_classes)])
        encoded = denoiser.encode(tokens, visible, y)
        decoded = denoiser.decode(encoded, visible)  # (N, L, D), or (2N, L, D)
        self.z = take(decoded, turn).flatten(0, 1)  # (N*K, D), or (2N*K, D)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser.head(x, t, self.z).to(x.dtype)  # (N*K, 2C), or (2N*K, 2C)
