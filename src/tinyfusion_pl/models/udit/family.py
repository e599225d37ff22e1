"""Sizes and layout of U-DiT."""

from __future__ import annotations

from tinyfusion_pl.models.family import Family
from tinyfusion_pl.models.udit.model import UDiT

SIZES = {"s": (96, 4), "b": (192, 8), "l": (384, 16)}  # hidden_size, num_heads

FAMILY = Family(
    name="U-DiT",
    model=UDiT,
    sizes={
        f"udit_{size}": {"hidden_size": hidden_size, "num_heads": num_heads}
        for size, (hidden_size, num_heads) in SIZES.items()
    },
    published_names={f"udit_{size}": f"U-DiT-{size.upper()}" for size in SIZES},
    signs=("encoder_level_1.0.attn1.to_qkv.weight", "latent.0.attn1.to_qkv.weight"),
    label_tables=("y_embedder_1.embedding_table.weight",),
)
