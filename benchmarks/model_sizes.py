"""Parameters, FLOPs and activations of transformers, from their sizes: DiT, SD3.5 and FLUX.

A multiplication with an addition counts as two FLOPs, as in `torch.utils.flop_counter`; elementwise
work is not counted. Activations are what each operation of a block keeps for its backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """A stack of equal blocks.

    Attributes:
        kind: ``"dit"`` (one stream), ``"joint"`` (one set of weights for each stream, attention
        over all) or ``"single"`` (attention and
            MLP side by side, all streams in one).
        num: How many.
        width: Channels D.
        tokens: T of each stream.
        mlp_ratio: Hidden width of the MLP over D.
    """

    kind: str
    num: int
    width: int
    tokens: tuple[int, ...]
    mlp_ratio: float = 4.0

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens)

    def params(self) -> float:
        """Weights of one block, without biases and norms, which are less than 0.1%."""
        d, r = self.width, self.mlp_ratio
        if self.kind == "single":
            return (3 + r + 1 + r + 3) * d**2  # qkv and MLP in one, out of both in one, modulation
        return len(self.tokens) * (4 + 2 * r + 6) * d**2  # qkv and projection, MLP, modulation

    def flops(self) -> float:
        """Of one block's forward pass on one sample."""
        d, t, r = self.width, self.num_tokens, self.mlp_ratio
        modulation = 2 * d * (3 * d if self.kind == "single" else 6 * d * len(self.tokens))
        return modulation + 2 * t * (4 + 2 * r) * d**2 + 4 * t**2 * d

    def lora_params(self, rank: int) -> float:
        """Of adapters on every linear layer: rank x (inputs + outputs)."""
        d, r = self.width, self.mlp_ratio
        if self.kind == "single":
            return rank * d * (6 + 2 * r + 4)
        return len(self.tokens) * rank * d * (8 + 2 * r + 7)

    def lora_flops(self, rank: int) -> float:
        """Of those adapters, forward on one sample."""
        d, r = self.width, self.mlp_ratio
        per_token, modulation = (6, 4) if self.kind == "single" else (8, 7 * len(self.tokens))
        return 2 * rank * d * (self.num_tokens * (per_token + 2 * r) + modulation)

    def activations(self, *, mixed: bool) -> float:
        """Bytes that the backward pass of one block needs for one sample.

        In units of T x D: the inputs of both norms, their outputs, the modulated inputs of qkv and
        MLP; q, k, v; the attention's output and its projection; the MLP's two hidden activations
        and its output. `mixed`: what autocast keeps in 2 bytes, beside normalisations in 4."""
        d, t, r = self.width, self.num_tokens, self.mlp_ratio
        if self.kind == "single":  # one norm for both, and one projection
            precise, cast = 2, 1 + 3 + 2 * r + 1 + 1
        else:
            precise, cast = 4, 2 + 3 + 1 + 1 + 2 * r + 1
        return t * d * (4 * precise + (2 if mixed else 4) * cast)


@dataclass(frozen=True)
class Model:
    """A denoiser: its stacks, and weights and FLOPs of the rest."""

    name: str
    stacks: tuple[Blocks, ...]
    rest_params: float = 0.0
    rest_flops: float = 0.0

    def params(self) -> float:
        return sum(s.num * s.params() for s in self.stacks) + self.rest_params

    def block_flops(self) -> float:
        return sum(s.num * s.flops() for s in self.stacks)

    def flops(self) -> float:
        """Of a forward pass on one sample."""
        return self.block_flops() + self.rest_flops

    def activations(self, *, mixed: bool) -> float:
        """Bytes for one sample; of the rest, the last layer's input, its norm and what the
        modulation makes of that.
        """
        last = self.stacks[-1]
        return (
            sum(s.num * s.activations(mixed=mixed) for s in self.stacks)
            + 12 * last.tokens[0] * last.width
        )

    def boundaries(self, *, mixed: bool) -> float:
        """Bytes of the blocks' inputs, all that activation checkpointing keeps."""
        return sum(
            s.num * s.num_tokens * s.width * (2 if mixed and s.kind != "dit" else 4)
            for s in self.stacks
        )


def dit(
    name: str,
    *,
    depth: int,
    width: int,
    tokens: int = 256,
    patch: int = 2,
    channels: int = 4,
    classes: int = 1000,
) -> Model:
    """DiT: patches of the latents, twice the channels out, a table of labels."""
    d, inside, out = width, patch**2 * channels, patch**2 * 2 * channels
    embed = inside * d + 256 * d + d * d
    last = d * out + 2 * d * d
    return Model(
        name,
        (Blocks("dit", depth, d, (tokens,)),),
        embed + last + (classes + 1) * d,
        2 * (tokens * inside * d + 256 * d + d * d + tokens * d * out + 2 * d * d),
    )


def mmdit(
    name: str,
    *,
    num_joint: int,
    num_single: int,
    width: int,
    image: int,
    text: int,
    pooled: int,
    guidance: bool,
    ends_image: bool,
    patch: int = 64,
    context: int = 4096,
) -> Model:
    """SD3 and FLUX: joint blocks, then single ones; `ends_image`: the last joint block has no text
    stream out.
    """
    d = width
    vectors = (256 * d + d * d) * (2 if guidance else 1) + pooled * d + d * d
    last = d * patch + 2 * d * d
    params, flops = (
        patch * d + context * d + vectors + last,
        image * patch * d + text * context * d + vectors + image * d * patch + 2 * d * d,
    )
    # Text stream of the last block: two modulations instead of six; q, k, v, no projection, no MLP.
    if ends_image:
        params -= (4 + 1 + 8) * d * d
        flops -= 4 * d * d + text * (1 + 8) * d * d
    stacks = [Blocks("joint", num_joint, d, (image, text))]
    if num_single:
        stacks.append(Blocks("single", num_single, d, (image, text)))
    return Model(name, tuple(stacks), params, 2 * flops)


MODELS = {
    "DiT-XL/2": dit("DiT-XL/2", depth=28, width=1152),
    "SD3.5-L": mmdit(
        "SD3.5-L",
        num_joint=38,
        num_single=0,
        width=2432,
        image=4096,
        text=333,
        pooled=2048,
        guidance=False,
        ends_image=True,
    ),
    "FLUX.1-dev": mmdit(
        "FLUX.1-dev",
        num_joint=19,
        num_single=38,
        width=3072,
        image=4096,
        text=512,
        pooled=768,
        guidance=True,
        ends_image=False,
    ),
}
