"""Layers that several families share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCY_CHANNELS = 256


def sinusoidal_features(t: Tensor, num_channels: int, *, frequency_shift: int = 0) -> Tensor:
    """Cosines, then sines of `t` (N,) at num_channels / 2 frequencies: float32 (N, num_channels).

    Frequencies fall from 1 to 1/10000: exactly with `frequency_shift` 1, just above it with 0.
    """
    half = num_channels // 2
    frequencies = torch.exp(
        -math.log(10000)
        * torch.arange(half, dtype=torch.float32, device=t.device)
        / (half - frequency_shift)
    )
    angles = t[:, None].float() * frequencies  # (N, C/2)
    return torch.cat([angles.cos(), angles.sin()], 1)  # (N, C)


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep features and a two-layer perceptron; see `DiT` for `frequency_shift`."""

    def __init__(self, hidden_size: int, *, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_CHANNELS, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps `t` (N,)."""
        features = sinusoidal_features(
            t, FREQUENCY_CHANNELS, frequency_shift=self.frequency_shift
        )  # (N, 256)
        return self.mlp(features.to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Class embeddings; with `has_null`, the last row of the table is the null label's."""

    def __init__(self, num_classes: int, hidden_size: int, *, has_null: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + has_null, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels `y` (N,)."""
        return self.embedding_table(y)  # (N, D)


def initialize_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every linear layer of `module`, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """Patches (N, T, P*P*C), row by row of a square, to (N, C, H, W)."""
    n, num_patches, num_values = x.shape
    grid, p, channels = math.isqrt(num_patches), patch_size, num_values // patch_size**2
    x = x.view(n, grid, grid, p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (N, C, G, P, G, P)
    return x.reshape(n, channels, grid * p, grid * p)  # (N, C, H, W)
