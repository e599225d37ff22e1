"""MAR's sampler: tokens in random order, some at a time, each by reverse diffusion (Li et al., arXiv 2406.11838, sections 3.2, 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfusion_pl.models.mar import put, take
from tinyfusion_pl.objectives.gaussian_process import GaussianProcess
from tinyfusion_pl.objectives.gaussian_samplers import GaussianSampling
from tinyfusion_pl.objectives.guidance import check_guidance

GUIDANCE_SCHEDULES = ("linear", "constant")


def to_tokens(latents: Tensor) -> Tensor:
    """Latents (N, C, H, W) as tokens (N, H*W, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def masked_counts(num_tokens: int, num_iterations: int) -> list[int]:
    """How many tokens are still masked after each iteration: floor(L cos(pi/2 * (i + 1)/I)), at least one fewer each time, 0 at the end.

    With more iterations than tokens there is one for each token.
    """
    counts, left = [], num_tokens
    for i in range(num_iterations - 1):
        if left == 1:
            break
        left = max(
            1,
            min(
                left - 1, math.floor(num_tokens * math.cos(math.pi / 2 * (i + 1) / num_iterations))
            ),
        )
        counts.append(left)
    return [*counts, 0]


def guidance_at(
    num_masked: int, num_tokens: int, *, guidance_scale: float, guidance_schedule: str
) -> float:
    """The guidance scale of an iteration that leaves `num_masked` tokens masked: growing with the share of known tokens, or constant."""
    if guidance_schedule == "constant":
        return guidance_scale
    # As published, the last iteration counts one token as masked.
    return 1 + (guidance_scale - 1) * (num_tokens - max(1, num_masked)) / num_tokens


@dataclass(frozen=True, kw_only=True)
class MaskedSampling:
    """How tokens are sampled.

    Args:
        num_iterations: Iterations, >= 1; as many as tokens or more: one token at a time (published: 256).
        num_sampling_steps: Diffusion steps of each token, 1 to the process's number (published: 100).
        guidance_scale: Of classifier-free guidance in the head's noise prediction; 1 is none (published: 3.0).
        guidance_schedule: ``"linear"``: from 1 to `guidance_scale` as the share of known tokens grows; or ``"constant"``.
        temperature: Factor on the noise of the diffusion steps, >= 0 (published: 1).

    Raises:
        ValueError: for settings out of range.
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
                f"guidance_schedule is {self.guidance_schedule!r}; give one of {', '.join(map(repr, GUIDANCE_SCHEDULES))}."
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature is {self.temperature}; give a number >= 0 (published: 1)."
            )
        check_guidance(None, self.guidance_scale)

    @property
    def num_noises(self) -> int:
        """One for each diffusion step of a token, and one for the order in which tokens are sampled."""
        return self.num_sampling_steps + 1


def sample_tokens(
    process: GaussianProcess,
    denoiser: nn.Module,
    z: Tensor,
    y: Tensor,
    options: MaskedSampling,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample all tokens of latents (N, C, H, W) from `z` with labels `y` (N,).

    Each iteration runs encoder and decoder once, and the reverse diffusion with the head for the tokens that are its turn, as many in each
    sample. A sample depends on its own noise alone, not on the batch.

    Args:
        process: The tokens' process.
        denoiser: A `MAR`: its ``encode``, ``decode`` and ``head`` are called.
        z: (N, C, H, W), at each position the noise that its token starts from.
        options: See `MaskedSampling`.
        noise: (num_sampling_steps + 1, N, C, H, W): the steps' noise at each position, the first for the noisiest step, then one whose
            first channel gives the order (its smallest values are sampled last). Default: drawn.
        generator: Where noise is drawn from; its device may be another than that of `z`.

    Raises:
        ValueError: for more steps than the process has, noise of another shape, or a denoiser that is no MAR.
    """
    process.respaced(options.num_sampling_steps)
    if missing := [name for name in ("encode", "decode", "head") if not hasattr(denoiser, name)]:
        raise ValueError(
            f"The denoiser has no {', '.join(missing)}: MAR's sampler needs a MAR. Set the objective that the denoiser was "
            "trained with."
        )
    expected = (options.num_noises, *z.shape)
    if noise is None:
        device = z.device if generator is None else generator.device
        noise = torch.randn(expected, generator=generator, device=device, dtype=z.dtype).to(
            z.device
        )
    elif noise.shape != expected:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; expected {expected} (steps and one for the order, then the shape of z)."
        )
    n, c, *_ = z.shape
    start, step_noise = (
        to_tokens(z),
        noise[:-1].flatten(3).transpose(2, 3),
    )  # (N, L, C), (S, N, L, C)
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
        head = _Head(denoiser, tokens, visible, turn, y, with_null=scale != 1)
        drawn = step_noise.gather(
            2, turn[None, ..., None].expand(len(step_noise), -1, -1, c)
        ).flatten(1, 2)  # (S, N*K, C)
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
            noise=options.temperature * drawn,
        )  # (N*K, C)
        tokens = put(tokens, turn, sampled.view(n, -1, c))  # (N, L, C)
        num_masked = num_left
    return tokens.transpose(1, 2).reshape(z.shape)  # (N, C, H, W)


class _Head:
    """A MAR's head for the tokens of one iteration, called as a sampler calls a denoiser whose samples are those tokens.

    The transformer runs here, once; with guidance on the batch and on the same with the null label behind it, as `guided` puts them.
    """

    def __init__(
        self,
        denoiser: nn.Module,
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
        decoded = denoiser.decode(
            denoiser.encode(tokens, visible, y), visible
        )  # (N, L, D), or (2N, L, D)
        self.z = take(decoded, turn).flatten(0, 1)  # (N*K, D), or (2N*K, D)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser.head(x, t, self.z).to(x.dtype)  # (N*K, 2C), or (2N*K, 2C)
