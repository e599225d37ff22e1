"""U-DiT's layers: attention over subsampled tokens and a re-parameterized feed-forward network.

Tian et al., arXiv 2405.02730, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinyfusion_pl.models.udit.positions import rotate

FACTOR = 2
"""Downsampling of tokens in attention and of feature maps between stages."""
MAX_LOG_SCALE = 4.605170185988092
"""log 100: the temperature of the cosine attention stays above 0.01 (Swin V2)."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalize `x` (N, C, H, W) over its channels, then scale and shift it by (N, C)."""
    normal = functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(
        0, 3, 1, 2
    )
    return normal * (1 + scale[:, :, None, None]) + shift[:, :, None, None]  # (N, C, H, W)


class TokenDownsampler(nn.Module):
    """A depthwise convolution with shortcut, then four interleaved subsamples as sequences."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (4N, T, C) of the subsamples of `x` (N, C, H, W)."""
        x = x + self.layer(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // FACTOR, FACTOR, w // FACTOR, FACTOR).permute(
            0, 3, 5, 2, 4, 1
        )  # (N, 2, 2, H/2, W/2, C)
        return x.reshape(n * FACTOR**2, h * w // FACTOR**2, c)  # (4N, T, C)


class DownsampledAttention(nn.Module):
    """Cosine attention with rotary positions within each of the four subsamples."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.downsampler = TokenDownsampler(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), 10.0).log())
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Attend within subsamples of `x` (N, C, H, W); `positions` as `rotation` returns them."""
        n, c, h, w = x.shape
        qkv = self.to_qkv(self.downsampler(x)).unflatten(
            -1, (3, self.num_heads, -1)
        )  # (4N, T, 3, heads, C/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (4N, heads, T, C/heads)
        q, k = (rotate(functional.normalize(part.float(), dim=-1), positions) for part in (q, k))
        q = q * self.logit_scale.float().clamp(max=MAX_LOG_SCALE).exp()
        out = functional.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, scale=1.0
        )  # (4N, heads, T, C/heads)
        out = out.transpose(1, 2).reshape(n, FACTOR, FACTOR, h // FACTOR, w // FACTOR, c)
        return self.to_out(out.permute(0, 5, 3, 1, 4, 2).reshape(n, c, h, w))  # (N, C, H, W)


class FeedForward(nn.Module):
    """Pointwise, depthwise and pointwise convolution, re-parameterized in training.

    Each pointwise convolution is then two in sequence; the depthwise one is the sum of 5x5, 3x3 and
    1x1 convolutions and the identity. `merged_convolutions` folds them.
    """

    KERNELS = (5, 3, 1)

    def __init__(self, channels: int, hidden_channels: int, *, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        if merged:
            self.project_in = nn.Conv2d(channels, hidden_channels, 1)
            self.dwconv = nn.Conv2d(
                hidden_channels,
                hidden_channels,
                self.KERNELS[0],
                padding=self.KERNELS[0] // 2,
                groups=hidden_channels,
            )
            self.project_out = nn.Conv2d(hidden_channels, channels, 1)
        else:
            self.project_in = nn.Sequential(
                nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, hidden_channels, 1)
            )
            self.dwconv = nn.ModuleList(
                nn.Conv2d(
                    hidden_channels,
                    hidden_channels,
                    kernel,
                    padding=kernel // 2,
                    groups=hidden_channels,
                )
                for kernel in self.KERNELS
            )
            self.project_out = nn.Sequential(
                nn.Conv2d(hidden_channels, channels, 1), nn.Conv2d(channels, channels, 1)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network to features `x` (N, C, H, W)."""
        x = functional.gelu(self.project_in(x))  # (N, R*C, H, W)
        x = (
            self.dwconv(x) if self.merged else x + sum(conv(x) for conv in self.dwconv)
        )  # (N, R*C, H, W)
        return self.project_out(x)  # (N, C, H, W)

    def merged_convolutions(self) -> dict[str, Tensor]:
        """The state dict of the merged form, summed in float64."""
        kernel = sum(
            functional.pad(conv.weight.double(), [(self.KERNELS[0] - size) // 2] * 4)
            for size, conv in zip(self.KERNELS, self.dwconv)
        )
        kernel[:, :, self.KERNELS[0] // 2, self.KERNELS[0] // 2] += 1  # the identity
        state = {
            "dwconv.weight": kernel,
            "dwconv.bias": sum(conv.bias.double() for conv in self.dwconv),
        }
        for name, (first, second) in {
            "project_in": self.project_in,
            "project_out": self.project_out,
        }.items():
            matrix = second.weight.double().flatten(1)
            state[f"{name}.weight"] = (matrix @ first.weight.double().flatten(1))[:, :, None, None]
            state[f"{name}.bias"] = matrix @ first.bias.double() + second.bias.double()
        return {key: value.to(first.weight.dtype) for key, value in state.items()}


class UDiTBlock(nn.Module):
    """Twice attention and feed-forward, modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, *, merged: bool) -> None:
        super().__init__()
        for i in (1, 2):
            self.add_module(f"attn{i}", DownsampledAttention(channels, num_heads))
            self.add_module(
                f"mlp{i}", FeedForward(channels, int(channels * mlp_ratio), merged=merged)
            )
            self.add_module(
                f"adaLN_modulation{i}", nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
            )

    def forward(self, x: Tensor, c: Tensor, positions: Tensor) -> Tensor:
        """Apply the block to features `x` (N, C, H, W) under conditioning `c` (N, C)."""
        for attn, mlp, modulation in (
            (self.attn1, self.mlp1, self.adaLN_modulation1),
            (self.attn2, self.mlp2, self.adaLN_modulation2),
        ):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(c).chunk(6, 1)  # each (N, C)
            x = x + gate1[:, :, None, None] * attn(
                modulate(x, shift1, scale1), positions
            )  # (N, C, H, W)
            x = x + gate2[:, :, None, None] * mlp(modulate(x, shift2, scale2))  # (N, C, H, W)
        return x


class Downsample(nn.Module):
    """Half the height and width, twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(FACTOR)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Downsample features `x` (N, C, H, W)."""
        return self.body(x)  # (N, 2C, H/2, W/2)


class Upsample(nn.Module):
    """Twice the height and width, half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels * 2, 3, padding=1, bias=False), nn.PixelShuffle(FACTOR)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Upsample features `x` (N, C, H, W)."""
        return self.body(x)  # (N, C/2, 2H, 2W)


class ConvEmbedder(nn.Module):
    """Latents to features, by a 3x3 convolution; no patches."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Embed latents `x` (N, C_in, H, W)."""
        return self.proj(x)  # (N, C, H, W)


class FinalLayer(nn.Module):
    """Modulated normalization and a 3x3 convolution to the prediction."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_proj = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Predict from features `x` (N, C, H, W) under conditioning `c` (N, C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)  # each (N, C)
        return self.out_proj(modulate(x, shift, scale))  # (N, C_out, H, W)
