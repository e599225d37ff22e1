"""MAR's diffusion head: a small residual MLP that denoises each token independently.

Li et al., arXiv 2406.11838, sections 3.2 and 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.models.layers import TimestepEmbedder, initialize_linears


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift  # (..., W)


class ResidualBlock(nn.Module):
    """Two-layer MLP, modulated and gated by the conditioning (adaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply the block to `x` (..., W) under conditioning `c` (..., W)."""
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, -1)  # each (..., W)
        return x + gate * self.mlp(_modulate(self.in_ln(x), shift, scale))  # (..., W)


class OutputLayer(nn.Module):
    """Modulated normalization and projection to the prediction."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Project `x` (..., W) under conditioning `c` (..., W)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)  # each (..., W)
        return self.linear(_modulate(self.norm_final(x), shift, scale))  # (..., C_out)


def _call(block: Callable[..., Any], *args: Any) -> Any:
    return block(*args)


class DiffusionHead(nn.Module):
    """Predicts noise and variance of each noised token from its timestep and conditioning vector.

    Args:
        in_channels: Channels of a token, >= 1; the output has twice as many.
        cond_channels: Width of the conditioning vectors, >= 1.
        width: Width of the residual blocks, >= 1 (published: 1024 in MAR-B, 1280 in L, 1536 in H).
        depth: Number of residual blocks, >= 1 (published: 6 in MAR-B, 8 in L, 12 in H).
    """

    def __init__(self, *, in_channels: int, cond_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(cond_channels, width)
        self.input_proj = nn.Linear(in_channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = OutputLayer(width, 2 * in_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Every block starts as the identity, the output as zero."""
        initialize_linears(self)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for zero in (
            *(block.adaLN_modulation[1] for block in self.res_blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(zero.weight)

    def forward(
        self, x: Tensor, t: Tensor, z: Tensor, *, run: Callable[..., Any] = _call
    ) -> Tensor:
        """Predict noise and variance; leading dimensions broadcast.

        Args:
            x: Noised tokens (..., C).
            t: Timesteps (...).
            z: Conditioning vectors (..., Z), shared by the noised versions of a token.
            run: Calls the blocks, see `Denoiser.run`.

        Returns:
            (..., 2C).
        """
        times = self.time_embed(t.flatten()).view(*t.shape, -1)  # (..., W)
        c = times + self.cond_embed(z)  # (..., W)
        x = self.input_proj(x)  # (..., W)
        for block in self.res_blocks:
            x = run(block, x, c)  # (..., W)
        return self.final_layer(x, c)  # (..., 2C)
