"""U-DiT: a U-shaped diffusion transformer with attention over downsampled tokens.

Tian et al., arXiv 2405.02730. Parameter names and layout are those of the published checkpoints
(YuchuanTian/U-DiT); the code is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyfusion_pl.models.denoiser import Denoiser
from tinyfusion_pl.models.layers import LabelEmbedder, TimestepEmbedder, initialize_linears
from tinyfusion_pl.models.udit.layers import (
    FACTOR,
    ConvEmbedder,
    Downsample,
    FinalLayer,
    UDiTBlock,
    Upsample,
)
from tinyfusion_pl.models.udit.positions import rotation


class UDiT(Denoiser):
    """U-shaped diffusion transformer. Its stacks are its five stages, none of which gets empty.

    Level 1 has the full resolution and `hidden_size` channels, level 2 half the resolution and
    twice the channels, the latent stage a quarter and four times. The last stage (decoder, level 1)
    has the encoder's features beside the decoder's: twice the channels.

    Args:
        input_size: Height and width of the latents, a multiple of 8: two stages downsample, and the
            innermost attention subsamples.
        in_channels: Channels of the latents.
        hidden_size: Channels at level 1, a multiple of 4 times `num_heads`.
        depth_encoder_1: Blocks of the encoder at level 1.
        depth_encoder_2: Blocks of the encoder at level 2.
        depth_latent: Blocks of the latent stage.
        depth_decoder_2: Blocks of the decoder at level 2.
        depth_decoder_1: Blocks of the decoder at level 1.
        num_heads: Attention heads, the same in every stage.
        mlp_ratio: Hidden channels of the feed-forward over its channels.
        num_classes: Labels are 0 .. num_classes - 1; num_classes is the null label of
            classifier-free guidance.
        class_dropout_prob: Above 0, the label tables have a row for the null label. The training
            module drops the labels.
        learn_sigma: Predict the variance too, in twice as many output channels.
        merged: Use the folded feed-forward convolutions (see `merging.merged`), for sampling;
            published weights are not folded.
        activation_checkpointing: See `Denoiser`.

    Raises:
        ValueError: Sizes are invalid or do not fit together.
    """

    STACKS = {
        "encoder_level_1": "depth_encoder_1",
        "encoder_level_2": "depth_encoder_2",
        "latent": "depth_latent",
        "decoder_level_2": "depth_decoder_2",
        "decoder_level_1": "depth_decoder_1",
    }

    def __init__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth_encoder_1: int = 2,
        depth_encoder_2: int = 5,
        depth_latent: int = 8,
        depth_decoder_2: int = 5,
        depth_decoder_1: int = 2,
        num_heads: int = 16,
        mlp_ratio: float = 2.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        merged: bool = False,
        activation_checkpointing: bool | float = False,
    ) -> None:
        depths = {
            "depth_encoder_1": depth_encoder_1,
            "depth_encoder_2": depth_encoder_2,
            "depth_latent": depth_latent,
            "depth_decoder_2": depth_decoder_2,
            "depth_decoder_1": depth_decoder_1,
        }
        sizes = {
            "input_size": input_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_classes": num_classes,
            **depths,
        }
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ValueError(
                "A U-DiT's sizes must be at least 1, got "
                f"{', '.join(f'{k}={v}' for k, v in wrong.items())}."
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(
                f"class_dropout_prob is {class_dropout_prob}; give a probability in [0, 1] "
                "(published: 0.1)."
            )
        if input_size % FACTOR**3:
            raise ValueError(
                f"input_size {input_size} is not a multiple of {FACTOR**3}, as two downsampling "
                "stages and subsampled tokens require."
            )
        if hidden_size % (4 * num_heads):
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4 times num_heads ({num_heads}), "
                "for 2-D rotary positions."
            )
        super().__init__(
            dict(
                input_size=input_size,
                in_channels=in_channels,
                hidden_size=hidden_size,
                **depths,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                num_classes=num_classes,
                class_dropout_prob=class_dropout_prob,
                learn_sigma=learn_sigma,
                merged=merged,
            ),
            activation_checkpointing=activation_checkpointing,
        )
        self.input_size, self.num_heads, self.learn_sigma = input_size, num_heads, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        width1, width2, width3 = hidden_size, 2 * hidden_size, 4 * hidden_size

        def stage(depth: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(
                UDiTBlock(width, num_heads, mlp_ratio, merged=merged) for _ in range(depth)
            )

        self.x_embedder = ConvEmbedder(in_channels, width1)
        for level, width in enumerate((width1, width2, width3), start=1):
            self.add_module(f"t_embedder_{level}", TimestepEmbedder(width))
            self.add_module(
                f"y_embedder_{level}",
                LabelEmbedder(num_classes, width, has_null=class_dropout_prob > 0),
            )
        self.encoder_level_1 = stage(depth_encoder_1, width1)
        self.down1_2 = Downsample(width1)
        self.encoder_level_2 = stage(depth_encoder_2, width2)
        self.down2_3 = Downsample(width2)
        self.latent = stage(depth_latent, width3)
        self.up3_2 = Upsample(width3)
        self.reduce_chan_level2 = nn.Conv2d(2 * width2, width2, 1)
        self.decoder_level_2 = stage(depth_decoder_2, width2)
        self.up2_1 = Upsample(width2)
        self.reduce_chan_level1 = nn.Conv2d(width2, width2, 1)
        self.decoder_level_1 = stage(depth_decoder_1, width2)
        self.output = nn.Conv2d(width2, width2, 3, padding=1)
        self.final_layer = FinalLayer(width2, self.out_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """adaLN-Zero as in DiT; convolutions keep torch's initialization."""
        initialize_linears(self)
        for module in self.modules():
            if isinstance(module, TimestepEmbedder):
                for index in (0, 2):
                    nn.init.normal_(module.mlp[index].weight, std=0.02)
            elif isinstance(module, LabelEmbedder):
                nn.init.normal_(module.embedding_table.weight, std=0.02)
        zeros = [self.final_layer.adaLN_modulation[1], self.final_layer.out_proj]
        for block in (module for module in self.modules() if isinstance(module, UDiTBlock)):
            zeros += [block.adaLN_modulation1[1], block.adaLN_modulation2[1]]
        for zero in zeros:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def stage(self, blocks: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
        """Features `x` (N, C, H, W) through the blocks of a stage."""
        positions = rotation(
            x.shape[-1] // FACTOR, x.shape[1] // self.num_heads, x.device
        )  # (1, 2, T, C/heads/2)
        for block in blocks:
            x = self.run(block, x, c, positions)  # (N, C, H, W)
        return x

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise, and the variance with `learn_sigma`.

        Args:
            x: Latents (N, C, H, W).
            t: Timesteps (N,).
            y: Labels (N,).

        Returns:
            (N, C or 2C, H, W), in the dtype of `x`.
        """
        if tuple(x.shape[2:]) != (self.input_size, self.input_size):
            raise ValueError(
                f"The latents are {tuple(x.shape[2:])}; this U-DiT has input_size "
                f"{self.input_size}."
            )
        dtype = x.dtype
        c1 = self.t_embedder_1(t) + self.y_embedder_1(y)  # (N, D)
        c2 = self.t_embedder_2(t) + self.y_embedder_2(y)  # (N, 2D)
        c3 = self.t_embedder_3(t) + self.y_embedder_3(y)  # (N, 4D)
        x = self.x_embedder(x.to(self.output.weight.dtype))  # (N, D, H, W)
        level1 = self.stage(self.encoder_level_1, x, c1)  # (N, D, H, W)
        level2 = self.stage(self.encoder_level_2, self.down1_2(level1), c2)  # (N, 2D, H/2, W/2)
        x = self.stage(self.latent, self.down2_3(level2), c3)  # (N, 4D, H/4, W/4)
        x = self.reduce_chan_level2(torch.cat([self.up3_2(x), level2], 1))  # (N, 2D, H/2, W/2)
        x = self.stage(self.decoder_level_2, x, c2)  # (N, 2D, H/2, W/2)
        x = self.reduce_chan_level1(torch.cat([self.up2_1(x), level1], 1))  # (N, 2D, H, W)
        x = self.stage(self.decoder_level_1, x, c2)  # (N, 2D, H, W)
        return self.final_layer(self.output(x), c2).to(dtype)  # (N, C_out, H, W)
