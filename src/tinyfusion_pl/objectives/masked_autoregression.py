"""MAR's objective: predict masked tokens, each by a small diffusion process.

Li et al., arXiv 2406.11838, sections 3.2, 3.4 and 4.2. Each batch draws a share of tokens to mask,
each sample an order. The denoiser sees the other tokens and predicts noise and variance of noised
versions of the masked ones; the loss is that of improved DDPM (2102.09672) with the cosine
schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.models import MaskedTokens
from tinyfusion_pl.models.mar import take
from tinyfusion_pl.objectives.base import Denoises, Distance, Draw, mean_square
from tinyfusion_pl.objectives.gaussian_diffusion import GaussianDiffusion
from tinyfusion_pl.objectives.masked_sampling import MaskedSampling, sample_tokens, to_tokens

MASK_RATIO_MEAN, MASK_RATIO_STD = 1.0, 0.25


@dataclass
class MaskedDraw(Draw[MaskedTokens]):
    """One draw of masks and noise, for M noised versions of each of K masked tokens.

    `x0` and `noise` are (N, M, K, C), `t` is (N, M, K).

    Attributes:
        x_t: Input of the denoiser.
        flat: The same diffusion draw with tokens as samples, (N*M*K, C).
        share: Masked tokens of this process over the mean of all processes (see
            `MaskedAutoregression`).
    """

    flat: Draw[Tensor]
    share: Tensor | float

    def rows(self, index: Tensor) -> MaskedDraw:
        """The draw for the samples at `index`; indices may repeat."""
        index, per_sample = index.to(self.x0.device), len(self.flat.t) // len(self.x0)
        flat_index = (
            index[:, None] * per_sample + torch.arange(per_sample, device=index.device)
        ).flatten()
        parts = {name: getattr(self, name).index_select(0, index) for name in ("x0", "t", "noise")}
        names = ("x0", "x_t", "t", "noise")
        flat = Draw(*(getattr(self.flat, name).index_select(0, flat_index) for name in names))
        return replace(
            self,
            **parts,
            x_t=MaskedTokens(*(each.index_select(0, index) for each in self.x_t)),
            flat=flat,
        )


class MaskedAutoregression:
    """MAR's masked loss, its distillation loss, and its sampler.

    Losses are means over all masked tokens of the global batch: processes may mask different
    numbers of tokens, so each weights its losses by its number. The averaged gradient of
    data-parallel training is then the gradient of the mean over the masked tokens of all processes.
    `draw` sums the numbers, so in distributed training all processes must call it.

    Args:
        mask_ratio_min: Minimum share of masked tokens, in [0, 1). The share is drawn from a normal
            distribution with mean 1 and standard deviation 0.25, truncated to [mask_ratio_min, 1]
            (published: 0.7).
        num_noised: Noised versions of each masked token, >= 1, that the head predicts per pass of
            the transformer (published: diffusion_batch_mul 4).
        num_timesteps: Timesteps of the tokens' diffusion process, which has the cosine schedule and
            a learned variance (published: 1000).

    Raises:
        ValueError: For settings out of range.
    """

    sampling_options = MaskedSampling  # the options of `sample`

    def __init__(
        self, *, mask_ratio_min: float = 0.7, num_noised: int = 4, num_timesteps: int = 1000
    ) -> None:
        if not 0 <= mask_ratio_min < 1:
            raise ValueError(
                f"mask_ratio_min is {mask_ratio_min}; give a share in [0, 1) (published: 0.7)."
            )
        if num_noised < 1:
            raise ValueError(f"num_noised is {num_noised}; give a count >= 1 (published: 4).")
        self.mask_ratio_min, self.num_noised = mask_ratio_min, num_noised
        self.diffusion = GaussianDiffusion(
            num_timesteps=num_timesteps, noise_schedule="cosine", learn_sigma=True
        )

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise ValueError for a denoiser without the parts of a MAR that the sampler calls."""
        if lacking := [
            part for part in ("encode", "decode", "head") if not hasattr(denoiser, part)
        ]:
            raise ValueError(
                f"{getattr(denoiser, 'model_name', type(denoiser).__name__)} is not a MAR: it has "
                f"no {', no '.join(lacking)}. Give model=mar_large, or the objective of this "
                "model: gaussian_diffusion for DiT and U-DiT, sit for SiT, noise for U-ViT."
            )

    # -- training -------------------------------------------------------------
    def draw(
        self,
        x0: Tensor,
        *,
        order: Tensor | None = None,
        num_masked: int | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> MaskedDraw:
        """Mask and noise latents, at random by default.

        Args:
            x0: (N, C, H, W).
            order: (N, L) int64, a permutation of positions for each sample; the first `num_masked`
                are masked. Default: drawn.
            num_masked: K, 1 to L = H*W. Default: drawn once per batch from the CPU generator, which
                needs no device synchronization.
            t: (N, M, K), timesteps of the noised versions of the masked tokens, by ascending
                position.
            noise: (N, M, K, C).

        Raises:
            ValueError: If `num_masked` is out of range.
        """
        tokens = to_tokens(x0)  # (N, L, C)
        n, num_tokens, c = tokens.shape
        if num_masked is None:
            num_masked = math.ceil(num_tokens * self.mask_ratio())
        if not 1 <= num_masked <= num_tokens:
            raise ValueError(
                f"num_masked is {num_masked}; give 1 to {num_tokens}, the number of tokens."
            )
        if order is None:
            order = torch.rand(n, num_tokens, device=x0.device).argsort(1)
        parts = order.tensor_split([num_masked], 1)
        masked, visible = (part.sort(1).values for part in parts)  # (N, K), (N, L - K)
        target = take(tokens, masked)[:, None].expand(-1, self.num_noised, -1, -1)  # (N, M, K, C)
        if t is None:
            t = torch.randint(self.diffusion.num_timesteps, target.shape[:3], device=x0.device)
        if noise is None:
            noise = torch.randn(target.shape, device=x0.device, dtype=x0.dtype)
        flat = self.diffusion.draw(target.reshape(-1, c), t=t.flatten(), noise=noise.reshape(-1, c))
        x_t = MaskedTokens(tokens, visible, masked, flat.x_t.view(target.shape))
        return MaskedDraw(target, x_t, t, noise, flat, _share(masked.numel(), x0.device))

    def mask_ratio(self) -> float:
        """Draw a share of masked tokens in [mask_ratio_min, 1] from torch's CPU generator."""
        normal = NormalDist(MASK_RATIO_MEAN, MASK_RATIO_STD)
        low, high = normal.cdf(self.mask_ratio_min), normal.cdf(1.0)
        u = 1 - torch.rand((), dtype=torch.float64).item()  # in (0, 1], where the inverse is finite
        return min(max(normal.inv_cdf(low + (high - low) * u), self.mask_ratio_min), 1.0)

    def losses(self, output: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Per sample (N,): "mse" of epsilon, "vb" in bits per dimension, and their sum "loss".

        Means over the sample's masked tokens times this process's share: the mean over all samples
        of all processes is the mean over all masked tokens.
        """
        assert isinstance(draw, MaskedDraw)
        return self._per_sample(self.diffusion.losses(output.flatten(0, 2), draw.flat), draw)

    def distillation_losses(
        self,
        output: Tensor,
        teacher_output: Tensor,
        draw: Draw,
        *,
        distance: Distance = mean_square,
    ) -> dict[str, Tensor]:
        """Per sample (N,): "mse_kd", "vb_kd" and their sum "loss_kd" of the head's predictions.

        Weighted as in `losses`; see `GaussianDiffusion.distillation_losses`. `distance` receives
        the epsilon of all noised tokens of a sample, (N, C, M*K).
        """
        assert isinstance(draw, MaskedDraw)
        n = len(draw.x0)

        def of_samples(epsilon: Tensor, target: Tensor) -> Tensor:
            # (N*M*K, C) -> the sample's distance, repeated for its tokens (N*M*K,)
            ours, theirs = (
                x.view(n, -1, x.shape[-1]).transpose(1, 2)  # (N, C, M*K)
                for x in (epsilon, target)
            )
            return distance(ours, theirs).repeat_interleave(len(epsilon) // n)

        terms = self.diffusion.distillation_losses(
            output.flatten(0, 2),
            teacher_output.flatten(0, 2),
            draw.flat,
            distance=mean_square if distance is mean_square else of_samples,
        )
        return self._per_sample(terms, draw)

    def _per_sample(self, terms: dict[str, Tensor], draw: MaskedDraw) -> dict[str, Tensor]:
        n = len(draw.x0)
        return {name: values.view(n, -1).mean(1) * draw.share for name, values in terms.items()}

    # -- sampling -------------------------------------------------------------
    def check_sampling(self, **options: Any) -> None:
        """Raise ValueError for options that `sample` does not accept."""
        self.diffusion.respaced(MaskedSampling(**options).num_sampling_steps)

    def num_noises(self, **options: Any) -> int:
        """One per diffusion step of a token, and one for the order of tokens."""
        return MaskedSampling(**options).num_noises

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
        """Samples (N, C, H, W) from noise `z`; see `MaskedSampling` and `sample_tokens`."""
        return sample_tokens(
            self.diffusion,
            denoiser,
            z,
            y,
            MaskedSampling(**options),
            noise=noise,
            generator=generator,
        )


def _share(num_masked: int, device: torch.device) -> Tensor | float:
    """Masked tokens of this process over the mean of all processes."""
    distributed = torch.distributed
    if not (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        return 1.0
    total = torch.full((), float(num_masked), device=device)
    distributed.all_reduce(total)
    return num_masked * distributed.get_world_size() / total
