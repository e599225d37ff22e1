"""U-ViT: all tokens in one transformer with long skips (Bao et al., arXiv 2209.12152).

Parameter names and layout are those of the published checkpoints (baofff/U-ViT); the code is our
own. It predicts noise only, so its objective is `GaussianDiffusion(learn_sigma=False)`; the
published latent models were trained with Stable Diffusion's betas (``"scaled_linear"``).
"""

from __future__ import annotations

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from tinyfusion_pl.models.denoiser import Denoiser
from tinyfusion_pl.models.layers import sinusoidal_features, unpatchify

STACK = "in_blocks+out_blocks"
NUM_EXTRA_TOKENS = 2
"""Label and time, in this order, before the patches."""


class UViTBlock(nn.Module):
    """A transformer block; with a skip, a linear layer first adds the mirrored block's tokens."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, *, skip: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=nn.GELU)
        if skip:
            self.skip_linear = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Apply the block to tokens `x` (N, T, D), with those of the mirrored block in `skip`."""
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))  # (N, T, D)
        x = x + self.attn(self.norm1(x))  # (N, T, D)
        return x + self.mlp(self.norm2(x))  # (N, T, D)


class UViT(Denoiser):
    """U-ViT: one stack of in and out blocks, pruned in mirrored pairs; the middle block stays.

    Args:
        input_size: Height and width of the latents, a multiple of `patch_size`.
        patch_size: Height and width of a patch.
        in_channels: Channels of the latents.
        hidden_size: Width, even and a multiple of `num_heads`.
        depth: Number of in and out blocks, even. The middle block is not included (it is in the
            paper: 29 layers in U-ViT-H).
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over `hidden_size`.
        num_classes: Labels are 0 .. num_classes - 1; num_classes is the null label of
            classifier-free guidance.
        class_dropout_prob: Above 0, the label table has a row for the null label (published: 1001
            rows). The training module drops the labels.
        final_conv: End with a 3x3 convolution, as the published pixel models do.
        timestep_offset: Added to t before the embedding. Give 1 with the published latent models,
            which count timesteps from 1; `GaussianDiffusion` counts from 0.
        activation_checkpointing: See `Denoiser`.

    Raises:
        ValueError: Sizes are invalid or do not fit together.
    """

    STACKS = {STACK: "depth"}

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
        final_conv: bool = False,
        timestep_offset: float = 0.0,
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
                "A U-ViT's sizes must be at least 1, got "
                f"{', '.join(f'{k}={v}' for k, v in wrong.items())}."
            )
        if depth % 2:
            raise ValueError(
                f"depth is {depth}; give an even number: in and out blocks are mirrored, and the "
                "middle block is not counted (published: 28 in U-ViT-H)."
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(
                f"class_dropout_prob is {class_dropout_prob}; give a probability in [0, 1]."
            )
        if input_size % patch_size:
            raise ValueError(
                f"input_size {input_size} is not a multiple of patch_size {patch_size}."
            )
        if hidden_size % num_heads or hidden_size % 2:
            raise ValueError(
                f"hidden_size {hidden_size} must be even and a multiple of num_heads ({num_heads})."
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
                final_conv=final_conv,
                timestep_offset=timestep_offset,
            ),
            activation_checkpointing=activation_checkpointing,
        )
        self.patch_size, self.out_channels, self.timestep_offset = (
            patch_size,
            in_channels,
            timestep_offset,
        )
        self.patch_embed = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.label_emb = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)
        self.pos_embed = nn.Parameter(
            torch.empty(1, NUM_EXTRA_TOKENS + (input_size // patch_size) ** 2, hidden_size)
        )
        self.in_blocks = nn.ModuleList(
            UViTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth // 2)
        )
        self.mid_block = UViTBlock(hidden_size, num_heads, mlp_ratio)
        self.out_blocks = nn.ModuleList(
            UViTBlock(hidden_size, num_heads, mlp_ratio, skip=True) for _ in range(depth // 2)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.final_layer = (
            nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else nn.Identity()
        )
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Truncated normal with deviation 0.02 for linear layers and positions; zero biases."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def units(self, stack: str) -> tuple[tuple[int, ...], ...]:
        """In block i and the out block that takes its skip."""
        num_blocks = len(self.in_blocks) + len(self.out_blocks)
        return tuple((i, num_blocks - 1 - i) for i in range(num_blocks // 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: Latents (N, C, H, W).
            t: Timesteps (N,).
            y: Labels (N,).

        Returns:
            (N, C, H, W), in the dtype of `x`.
        """
        dtype, own = x.dtype, self.pos_embed.dtype
        time = sinusoidal_features(t + self.timestep_offset, self.pos_embed.shape[-1])  # (N, D)
        extra = [self.label_emb(y)[:, None], time.to(own)[:, None]]  # each (N, 1, D)
        x = torch.cat([*extra, self.patch_embed(x.to(own))], 1) + self.pos_embed  # (N, T, D)
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x)  # (N, T, D)
            skips.append(x)
        x = self.run(self.mid_block, x)  # (N, T, D)
        for block in self.out_blocks:
            x = self.run(block, x, skips.pop())  # (N, T, D)
        x = self.decoder_pred(self.norm(x))[:, NUM_EXTRA_TOKENS:]  # (N, T - 2, P*P*C)
        return self.final_layer(unpatchify(x, self.patch_size)).to(dtype)  # (N, C, H, W)
