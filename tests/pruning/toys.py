"""Small models with the shapes of calls that gated blocks must stand: conditioning, keywords, tuples, checkpointing."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.lin, self.cond, self.out = (
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x, c=None, table=None, *, scale=1.0):
        h = self.lin(x)
        if c is not None:
            h = h + self.cond(c)[:, None]
        if table is not None:
            h = h + table
        return x + self.out(torch.tanh(h)) * scale


class Toy(nn.Module):
    """`mode`: how blocks are called."""

    def __init__(self, depth=4, dim=6, mode="positional"):
        super().__init__()
        self.embed = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, dim)
        self.mode = mode

    def forward(self, x, c=None):
        h = self.embed(x)
        for block in self.blocks:
            if self.mode == "positional":
                h = block(h, c)
            elif self.mode == "keyword":
                h = block(x=h, c=c, scale=0.7)
            elif self.mode.startswith("checkpoint"):
                h = checkpoint(block, h, c, use_reentrant="reentrant" in self.mode)
        return self.head(h)


class PairBlock(nn.Module):
    """Takes and returns a pair of streams."""

    def __init__(self, dim=6):
        super().__init__()
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, pair):
        a, b = pair
        return a + torch.tanh(self.b(b)).mean(1, keepdim=True), b + torch.tanh(self.a(a)).mean(
            1, keepdim=True
        )


class PairToy(nn.Module):
    def __init__(self, depth=4, dim=6):
        super().__init__()
        self.blocks = nn.ModuleList(PairBlock(dim) for _ in range(depth))

    def forward(self, x, c=None):
        pair = (x, x.flip(1)[:, :2])
        for block in self.blocks:
            pair = block(pair)
        return pair[0].sum(1) + pair[1].sum(1)


class AttnToy(nn.Module):
    """Blocks return (hidden, extra), as blocks that return attention weights do."""

    def __init__(self, depth=4, dim=6):
        super().__init__()
        self.blocks = nn.ModuleList(ExtraBlock(dim) for _ in range(depth))

    def forward(self, x, c=None):
        extras = []
        for block in self.blocks:
            x, extra = block(x)
            extras.append(extra)
        return x + sum(e[:, None, None] for e in extras)


class ExtraBlock(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.lin = nn.Linear(dim, dim)

    def forward(self, x):
        h = torch.tanh(self.lin(x))
        return x + h, h.mean((1, 2))


class TwoStreamBlock(nn.Module):
    """Image and text as diffusers writes it: text comes second and is returned first."""

    def __init__(self, dim=6, dropout=0.0):
        super().__init__()
        self.a, self.b, self.mod, self.drop = (
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, hidden_states, encoder_hidden_states, temb=None, image_rotary_emb=None):
        joint = (
            torch.cat([self.a(hidden_states) * image_rotary_emb, self.b(encoder_hidden_states)], 1)
            .tanh()
            .mean(1, keepdim=True)
        )
        shift = self.mod(temb)[:, None]
        hidden_states = hidden_states + self.drop(self.a(joint + shift))
        encoder_hidden_states = encoder_hidden_states + self.drop(self.b(joint - shift))
        return encoder_hidden_states, hidden_states


class TwoStreamToy(nn.Module):
    """Text is as long as the image. `mode`: "plain", "checkpoint" or "checkpoint-reentrant"."""

    def __init__(self, depth=4, dim=6, mode="plain", dropout=0.0):
        super().__init__()
        self.mode, self.inp, self.head = mode, nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(TwoStreamBlock(dim, dropout) for _ in range(depth))

    def forward(self, x, temb):
        image, text, rotary = (
            self.inp(x),
            self.inp(x.flip(1)),
            torch.linspace(0.5, 1.5, x.shape[1])[:, None],
        )
        for block in self.transformer_blocks:
            if self.mode == "plain":
                text, image = block(
                    image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
                )
            else:
                text, image = checkpoint(
                    block, image, text, temb, rotary, use_reentrant="reentrant" in self.mode
                )
        return self.head(image + 0.5 * text.mean(1, keepdim=True))


def plain_formula(model, x, c, masks, blocks_call=None):
    """The three-line formula on the same model, written without any gate: masks (N, depth)."""
    h = model.embed(x)
    for i, block in enumerate(model.blocks):
        m = masks[:, i].view(-1, 1, 1).to(h.dtype)
        y = block(x=h, c=c, scale=0.7) if model.mode == "keyword" else block(h, c)
        h = m * y + (1 - m) * h
    return model.head(h)
