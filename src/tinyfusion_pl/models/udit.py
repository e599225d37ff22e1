"""U-DiT: a U-shaped diffusion transformer whose attention works on downsampled tokens (Tian et al., arXiv 2405.02730).

Own code; parameter names and layout are those of the published checkpoints. Section 3 of the paper: the encoder-decoder with its stages,
self-attention over the four interleaved subsamples of the feature map, and the re-parameterised feed-forward network.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinyfusion_pl.models.denoiser import Denoiser
from tinyfusion_pl.models.layers import LabelEmbedder, TimestepEmbedder, initialize_linears
from tinyfusion_pl.models.registry import register_model

FACTOR = 2
"""By which tokens are downsampled in attention, and images between stages."""
MAX_LOG_SCALE = (
    4.605170185988092  # log 100: the cosine attention's temperature stays above 0.01 (Swin V2)
)
ROTARY_BASE = 10000.0


def rotation(grid_size: int, head_size: int, device: torch.device) -> Tensor:
    """Cosines and sines of the 2-D rotary position embedding: float32 (1, 2, grid_size**2, head_size / 2).

    The channel pairs turn in turn with the column and with the row, at head_size / 4 frequencies. The leading axis of 1 tells that it is
    shared by the batch.
    """
    num_frequencies = head_size // 4
    frequencies = ROTARY_BASE ** -(
        torch.arange(num_frequencies, dtype=torch.float32, device=device) / num_frequencies
    )
    axis = (
        torch.arange(grid_size, dtype=torch.float32, device=device)[:, None] * frequencies
    )  # (G, F)
    angles = torch.stack(
        [axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)], -1
    ).flatten(1)  # (G*G, 2F)
    return torch.stack([angles.cos(), angles.sin()])[None]  # (1, 2, T, D/2)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Each pair of neighbouring channels of `x` (..., T, D) turned by its angle, see `rotation`."""
    cos, sin = by[0]  # (T, D/2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., T, D/2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(
        -2
    )  # (..., T, D)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise `x` (N, C, H, W) over its channels, then scale and shift it by (N, C)."""
    normal = functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(
        0, 3, 1, 2
    )
    return normal * (1 + scale[:, :, None, None]) + shift[:, :, None, None]  # (N, C, H, W)


class TokenDownsampler(nn.Module):
    """A depthwise convolution with shortcut, then the image's four interleaved subsamples, each a sequence of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // FACTOR, FACTOR, w // FACTOR, FACTOR).permute(
            0, 3, 5, 2, 4, 1
        )  # (N, 2, 2, H/2, W/2, C)
        return x.reshape(n * FACTOR**2, h * w // FACTOR**2, c)  # (4N, T, C)


class DownsampledAttention(nn.Module):
    """Cosine attention with rotary positions within each of the four subsamples, which are put back in their places."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.downsampler = TokenDownsampler(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), 10.0).log())
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
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
    """Pointwise, depthwise, pointwise; in training form each is several convolutions that make up one (`merged_convolutions`).

    The pointwise ones are two in a row; the depthwise ones (5x5, 3x3, 1x1) and the identity are added up.
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
        return self.body(x)  # (N, 2C, H/2, W/2)


class Upsample(nn.Module):
    """Twice the height and width, half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels * 2, 3, padding=1, bias=False), nn.PixelShuffle(FACTOR)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # (N, C/2, 2H, 2W)


class ConvEmbedder(nn.Module):
    """Latents to features, by a 3x3 convolution; no patches."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # (N, C, H, W)


class FinalLayer(nn.Module):
    """Modulated normalisation and a 3x3 convolution to the prediction."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_proj = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)  # each (N, C)
        return self.out_proj(modulate(x, shift, scale))  # (N, C_out, H, W)


class UDiT(Denoiser):
    """U-shaped diffusion transformer. Its stacks are its five stages; each keeps at least one block.

    Level 1 has the full resolution and `hidden_size` channels, level 2 half of it and twice the channels, the latent stage a quarter and
    four times the channels. The last stage (decoder, level 1) keeps the encoder's features beside the decoder's: twice the channels.

    Args:
        input_size: Height and width of the latents, a multiple of 8: two stages down, and subsampled tokens in the innermost.
        in_channels: Channels of the latents.
        hidden_size: Channels at level 1, a multiple of 4 times `num_heads`.
        depth_encoder_1, depth_encoder_2, depth_latent, depth_decoder_2, depth_decoder_1: Blocks of each stage (published: 2, 5, 8, 5, 2).
        num_heads: Attention heads, the same in every stage.
        mlp_ratio: Hidden channels of the feed-forward over its channels.
        num_classes: Labels are 0 .. num_classes - 1; num_classes is the null label of classifier-free guidance.
        class_dropout_prob: Above 0 the label tables have the null row. Dropping labels is the training module's part.
        learn_sigma: Predict the variance too: twice the channels come out.
        merged: Each convolution of the feed-forward is a single one (see `merged`): for sampling; published weights are not.
        activation_checkpointing: See `Denoiser`.

    Raises:
        ValueError: for sizes that do not fit together.
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
                f"A U-DiT's sizes must be at least 1, got {', '.join(f'{k}={v}' for k, v in wrong.items())}."
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(
                f"class_dropout_prob is {class_dropout_prob}; give a probability in [0, 1] (published: 0.1)."
            )
        if input_size % FACTOR**3:
            raise ValueError(
                f"input_size {input_size} is no multiple of {FACTOR**3}, which two stages down and subsampled tokens need."
            )
        if hidden_size % (4 * num_heads):
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4 times num_heads ({num_heads}), for 2-D rotary positions."
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
        """adaLN-Zero: every block starts as the identity, the output as zero, as in DiT; convolutions as torch has them."""
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
        """Predict for latents `x` (N, C, H, W) at timesteps `t` (N,) with labels `y` (N,): (N, C or 2C, H, W), in the dtype of `x`."""
        if tuple(x.shape[2:]) != (self.input_size, self.input_size):
            raise ValueError(
                f"The latents are {tuple(x.shape[2:])}; this U-DiT was built for input_size {self.input_size}."
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


@torch.no_grad()
def merged(model: UDiT) -> UDiT:
    """A copy of `model` with each group of the feed-forward's convolutions folded into one: equal outputs, an eighth fewer parameters.

    The copy's ``config`` says so, and it saves and loads like any other. A merged model is returned as a copy. Train the unmerged one.
    """
    if model.config["merged"]:
        return copy.deepcopy(model)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, FeedForward):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                del state[key]
            state.update(
                {f"{name}.{key}": value for key, value in module.merged_convolutions().items()}
            )
    with torch.device("meta"):
        new = UDiT(
            **{**model.config, "merged": True},
            activation_checkpointing=model.activation_checkpointing,
        )
    new.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    for name in ("model_name", "source"):
        if hasattr(model, name):
            setattr(new, name, getattr(model, name))
    return new.train(model.training)


SIZES = {"s": (96, 4), "b": (192, 8), "l": (384, 16)}

for _size, (_hidden_size, _num_heads) in SIZES.items():
    register_model(
        f"udit_{_size}",
        UDiT,
        alias=f"U-DiT-{_size.upper()}",
        hidden_size=_hidden_size,
        num_heads=_num_heads,
    )
