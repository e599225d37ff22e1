"""Sizes and layout of U-ViT."""

from __future__ import annotations

from typing import Any

from tinyfusion_pl.models.family import Family
from tinyfusion_pl.models.uvit.model import UViT

# Size -> hidden_size, depth, num_heads.
SIZES = {"s": (512, 12, 8), "m": (768, 16, 12), "l": (1024, 20, 16), "h": (1152, 28, 16)}
# Published with patch size 4: 64x64 pixels (S on CelebA, M on ImageNet) and the 64x64 latents of
# 512x512 images (L, H).
PIXELS = {"input_size": 64, "in_channels": 3, "final_conv": True}
LATENTS = {"input_size": 64}
INPUTS: dict[tuple[str, int], dict[str, Any]] = {
    **{(size, 2): {} for size in SIZES},
    ("s", 4): PIXELS,
    ("m", 4): PIXELS,
    ("l", 4): LATENTS,
    ("h", 4): LATENTS,
}

FAMILY = Family(
    name="U-ViT",
    model=UViT,
    sizes={
        f"uvit_{size}_{patch_size}": {
            "hidden_size": SIZES[size][0],
            "depth": SIZES[size][1],
            "num_heads": SIZES[size][2],
            "patch_size": patch_size,
            **inputs,
        }
        for (size, patch_size), inputs in INPUTS.items()
    },
    published_names={
        f"uvit_{size}_{patch_size}": f"U-ViT-{size.upper()}/{patch_size}"
        for size, patch_size in INPUTS
    },
    signs=(
        "in_blocks.0.norm1.weight",
        "mid_block.norm1.weight",
        "out_blocks.0.skip_linear.weight",
    ),
    label_tables=("label_emb.weight",),
)
