"""MAR: masked autoregressive image generation with a diffusion head (Li et al., arXiv 2406.11838).

Parameter names and layout are those of the published checkpoints (LTH14/mar); the code is our own.
An encoder sees the known tokens, a decoder gives each token a vector, and a small diffusion head
(`tinyfusion_pl.models.mar.head`) turns a token's vector into its distribution. Depth is pruned in
encoder and decoder, not in the head.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tinyfusion_pl.models.denoiser import Denoiser
from tinyfusion_pl.models.layers import initialize_linears
from tinyfusion_pl.models.mar.head import DiffusionHead


class MaskedTokens(NamedTuple):
    """Input of `MAR`: clean tokens, the visible ones among them, and noised masked ones.

    Visible and masked tokens are given by position, the same number in each sample: the shapes
    carry the counts, so that nothing synchronizes with the device.
    """

    tokens: Tensor  # (N, L, C); masked ones are ignored
    visible: Tensor  # (N, V) int64, positions of the known tokens
    masked: Tensor  # (N, K) int64, positions of the tokens to predict
    noised: Tensor  # (N, M, K, C), M noised versions of each of them


def take(x: Tensor, positions: Tensor) -> Tensor:
    """The tokens of `x` (N, L, D) at `positions` (N, K) of their sample: (N, K, D)."""
    return x.gather(1, _wide(positions, x))


def put(x: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """A copy of `x` (N, L, D) with `values` (N, K, D) at `positions` (N, K) of each sample."""
    return x.scatter(1, _wide(positions, x), values)


def _wide(positions: Tensor, like: Tensor) -> Tensor:
    return positions[..., None].expand(-1, -1, like.shape[-1])  # (N, K, D)


class MAR(Denoiser):
    """Masked autoregressive transformer with a diffusion head.

    Args:
        input_size: Height and width of the latents; each of their positions is a token.
        in_channels: Channels of the latents.
        hidden_size: Width of encoder and decoder, a multiple of `num_heads`.
        encoder_depth: Number of encoder blocks.
        decoder_depth: Number of decoder blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over `hidden_size`.
        num_classes: Labels are 0 .. num_classes - 1; num_classes is the null label of
            classifier-free guidance.
        buffer_size: Tokens in front of the others, which carry the label (published: 64).
        attn_dropout: Dropout of attention weights (published: 0.1).
        proj_dropout: Dropout of the outputs of attention and MLP (published: 0.1).
        head_width: Width of the diffusion head.
        head_depth: Number of blocks of the diffusion head.
        activation_checkpointing: See `Denoiser`; it applies to the head's blocks too.

    Raises:
        ValueError: Sizes are invalid or do not fit together.
    """

    STACKS = {"encoder_blocks": "encoder_depth", "decoder_blocks": "decoder_depth"}

    def __init__(
        self,
        *,
        input_size: int = 16,
        in_channels: int = 16,
        hidden_size: int = 1024,
        encoder_depth: int = 16,
        decoder_depth: int = 16,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        buffer_size: int = 64,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        head_width: int = 1280,
        head_depth: int = 8,
        activation_checkpointing: bool | float = False,
    ) -> None:
        sizes = {
            "input_size": input_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "encoder_depth": encoder_depth,
            "decoder_depth": decoder_depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "buffer_size": buffer_size,
            "head_width": head_width,
            "head_depth": head_depth,
        }
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            raise ValueError(
                "A MAR's sizes must be at least 1, got "
                f"{', '.join(f'{k}={v}' for k, v in wrong.items())}."
            )
        rates = {"attn_dropout": attn_dropout, "proj_dropout": proj_dropout}
        if wrong := {name: rate for name, rate in rates.items() if not 0 <= rate < 1}:
            raise ValueError(
                "Dropout must be in [0, 1), got "
                f"{', '.join(f'{k}={v}' for k, v in wrong.items())} (published: 0.1)."
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_heads ({num_heads})."
            )
        super().__init__(
            {**sizes, "mlp_ratio": mlp_ratio, **rates},
            activation_checkpointing=activation_checkpointing,
        )
        self.num_tokens, self.in_channels, self.buffer_size = (
            input_size**2,
            in_channels,
            buffer_size,
        )
        norm = partial(nn.LayerNorm, eps=1e-6)

        def blocks(depth: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(
                    hidden_size,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=True,
                    norm_layer=norm,
                    proj_drop=proj_dropout,
                    attn_drop=attn_dropout,
                )
                for _ in range(depth)
            )

        self.class_emb = nn.Embedding(num_classes, hidden_size)
        self.fake_latent = nn.Parameter(torch.empty(1, hidden_size))  # the null label's row
        self.z_proj, self.z_proj_ln = nn.Linear(in_channels, hidden_size), norm(hidden_size)
        num_positions = buffer_size + self.num_tokens
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, num_positions, hidden_size))
        self.encoder_blocks, self.encoder_norm = blocks(encoder_depth), norm(hidden_size)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, num_positions, hidden_size))
        self.decoder_blocks, self.decoder_norm = blocks(decoder_depth), norm(hidden_size)
        self.diffusion_pos_embed_learned = nn.Parameter(
            torch.empty(1, self.num_tokens, hidden_size)
        )
        self.initialize_weights()
        # Published name: diffloss.net. Last, because the head initializes itself.
        head = DiffusionHead(
            in_channels=in_channels, cond_channels=hidden_size, width=head_width, depth=head_depth
        )
        self.diffloss = nn.ModuleDict({"net": head})

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier-uniform linear layers; embeddings and tokens normal with deviation 0.02."""
        initialize_linears(self)
        for weight in (
            self.class_emb.weight,
            self.fake_latent,
            self.mask_token,
            self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned,
            self.diffusion_pos_embed_learned,
        ):
            nn.init.normal_(weight, std=0.02)

    def encode(self, tokens: Tensor, visible: Tensor, y: Tensor) -> Tensor:
        """Hidden states (N, B + V, D) of the buffer and the known tokens, ordered as `visible`.

        Args:
            tokens: (N, L, C); only known ones are used.
            visible: Positions (N, V) of the known tokens, 0 <= V <= L.
            y: Labels (N,); num_classes is the null label.

        Raises:
            ValueError: The number of tokens or channels is not the model's.
        """
        if tokens.shape[1:] != (expected := (self.num_tokens, self.in_channels)):
            raise ValueError(
                f"The tokens have shape {tuple(tokens.shape)}; this MAR takes (N, {expected[0]}, "
                f"{expected[1]}): latents of {self.in_channels} channels and "
                f"{self.config['input_size']} x {self.config['input_size']} positions."
            )
        b, positions = self.buffer_size, self.encoder_pos_embed_learned
        label = F.embedding(y, torch.cat([self.class_emb.weight, self.fake_latent]))  # (N, D)
        buffer = label[:, None] + positions[:, :b]  # (N, B, D)
        known = self.z_proj(take(tokens.to(positions.dtype), visible))  # (N, V, D)
        known = known + F.embedding(visible, positions[0, b:])  # (N, V, D)
        x = self.z_proj_ln(torch.cat([buffer, known], 1))  # (N, B + V, D)
        for block in self.encoder_blocks:
            x = self.run(block, x)  # (N, B + V, D)
        return self.encoder_norm(x)  # (N, B + V, D)

    def decode(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """Conditioning vectors (N, L, D) of all tokens.

        Args:
            hidden: The encoder's output (N, B + V, D).
            visible: Positions (N, V) that the encoder was given.
        """
        x = self.decoder_embed(hidden.to(self.mask_token.dtype))  # (N, B + V, D)
        buffer, known = x[:, : self.buffer_size], x[:, self.buffer_size :]  # (N, B, D), (N, V, D)
        x = put(
            self.mask_token.to(x.dtype).expand(len(x), self.num_tokens, -1), visible, known
        )  # (N, L, D)
        x = torch.cat([buffer, x], 1) + self.decoder_pos_embed_learned  # (N, B + L, D)
        for block in self.decoder_blocks:
            x = self.run(block, x)  # (N, B + L, D)
        return (
            self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned
        )  # (N, L, D)

    def head(self, noised: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Noise and variance (..., 2C) of tokens `noised` (..., C), see `DiffusionHead`."""
        dtype = self.mask_token.dtype
        return self.diffloss["net"](noised.to(dtype), t, z.to(dtype), run=self.run)  # (..., 2C)

    def forward(self, x: MaskedTokens, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance of the masked tokens' noised versions.

        Args:
            x: See `MaskedTokens`.
            t: Timesteps (N, M, K) of the noised versions.
            y: Labels (N,).

        Returns:
            (N, M, K, 2C), in the dtype of the tokens.
        """
        if not isinstance(x, MaskedTokens):
            raise ValueError(
                f"A MAR takes MaskedTokens, as objective=mar draws them, not a {type(x).__name__}."
            )
        hidden = self.encode(x.tokens, x.visible, y)  # (N, B + V, D)
        z = take(self.decode(hidden, x.visible), x.masked)  # (N, K, D)
        return self.head(x.noised, t, z[:, None]).to(x.tokens.dtype)  # (N, M, K, 2C)
