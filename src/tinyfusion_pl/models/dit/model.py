"""DiT: diffusion transformers with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

Parameter names and layout are those of the published checkpoints (facebookresearch/DiT); the code
is our own.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from tinyfusion_pl.models.denoiser import Denoiser
from tinyfusion_pl.models.layers import (
    LabelEmbedder,
    TimestepEmbedder,
    initialize_linears,
    unpatchify,
)


def sincos_position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding, float32 (grid_size**2, hidden_size).

    The first half of the channels encodes the column, the second half the row.
    """
    frequencies = 10000.0 ** -(
        torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4)
    )
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (G, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (G, D/2)
    columns, rows = axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)  # (G*G, D/2)
    return torch.cat([columns, rows], 1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens `x` (N, T, D) by (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]  # (N, T, D)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, *, norm2_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm2_eps)
        self.mlp = Mlp(
            hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh")
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply the block to tokens `x` (N, T, D) under conditioning `c` (N, D)."""
        modulation = self.adaLN_modulation(c).chunk(6, 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # each (N, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, T, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)


class FinalLayer(nn.Module):
    """Modulated normalization and projection to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Project tokens `x` (N, T, D) under conditioning `c` (N, D)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)  # each (N, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, P*P*C_out)


class DiT(Denoiser):
    """Diffusion transformer.

    Args:
        input_size: Height and width of the latents, a multiple of `patch_size`.
        patch_size: Height and width of a patch.
        in_channels: Channels of the latents.
        hidden_size: Width, a multiple of `num_heads` and of 4.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over `hidden_size`.
        num_classes: Labels are 0 .. num_classes - 1; num_classes is the null label of
            classifier-free guidance.
        class_dropout_prob: Above 0, the label table has a row for the null label. The training
            module drops the labels.
        learn_sigma: Predict the variance too, in twice as many output channels.
        frequency_shift: 0, as published, for timestep frequencies 10000**(-i/128); 1, as in
            diffusers, for 10000**(-i/127).
        norm2_eps: Epsilon of the normalization before the MLP: 1e-6 as published, 1e-5 is
            diffusers' default.
        activation_checkpointing: See `Denoiser`.

    Raises:
        ValueError: Sizes are invalid or do not fit together.
    """

    STACKS = {"blocks": "depth"}

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        frequency_shift: int = 0,
        norm2_eps: float = 1e-6,
        activation_checkpointing: bool | float = False,
    ) -> None:
        sizes = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "depth": depth,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_classes": num_classes,
        }
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ValueError(
                f"A {type(self).__name__}'s sizes must be at least 1, got "
                f"{', '.join(f'{k}={v}' for k, v in wrong.items())}."
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(
                f"class_dropout_prob is {class_dropout_prob}; give a probability in [0, 1] "
                "(published: 0.1)."
            )
        if frequency_shift not in (0, 1):
            raise ValueError(
                f"frequency_shift is {frequency_shift}; give 0 (published weights) or 1 (weights "
                "from diffusers)."
            )
        if not norm2_eps > 0:
            raise ValueError(
                f"norm2_eps is {norm2_eps}; give a small positive number (published: 1e-6)."
            )
        if input_size % patch_size:
            raise ValueError(
                f"input_size {input_size} is not a multiple of patch_size {patch_size}."
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_heads ({num_heads}) and of 4."
            )
        super().__init__(
            dict(
                input_size=input_size,
                patch_size=patch_size,
                in_channels=in_channels,
                hidden_size=hidden_size,
                depth=depth,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                num_classes=num_classes,
                class_dropout_prob=class_dropout_prob,
                learn_sigma=learn_sigma,
                frequency_shift=frequency_shift,
                norm2_eps=norm2_eps,
            ),
            activation_checkpointing=activation_checkpointing,
        )
        self.patch_size, self.learn_sigma = patch_size, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, has_null=class_dropout_prob > 0)
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(hidden_size, input_size // patch_size)[None],
            requires_grad=False,
        )
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, norm2_eps=norm2_eps) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """adaLN-Zero: every block starts as the identity, the output as zero (section 3.2)."""
        initialize_linears(self)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for zero in (
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(zero.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise, and the variance with `learn_sigma`.

        Args:
            x: Latents (N, C, H, W).
            t: Timesteps (N,).
            y: Labels (N,).

        Returns:
            (N, C or 2C, H, W), in the dtype of `x`.
        """
        dtype = x.dtype
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = self.run(block, x, c)  # (N, T, D)
        return unpatchify(self.final_layer(x, c), self.patch_size).to(dtype)  # (N, C_out, H, W)
