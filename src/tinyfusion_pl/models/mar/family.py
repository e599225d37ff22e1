"""Sizes, published checkpoints and layout of MAR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion_pl.models.family import Family, Published
from tinyfusion_pl.models.mar.model import MAR
from tinyfusion_pl.models.state_shapes import get_shape

# Size -> hidden_size, depth of encoder and decoder, num_heads, head_width, head_depth.
SIZES = {
    "base": (768, 12, 12, 1024, 6),
    "large": (1024, 16, 16, 1280, 8),
    "huge": (1280, 20, 16, 1536, 12),
}
WIDTHS = {sizes[0]: f"mar_{size}" for size, sizes in SIZES.items()}
WIDTH_KEY = "encoder_blocks.0.norm1.weight"


def read_sizes(
    state: Mapping[str, Tensor], where: str | Path, *, name: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The published MAR of equal width; its depths are read as for every family.

    Raises:
        ValueError: No published MAR has this width, and `name` is not given.
    """
    if name is None:
        width = get_shape(state, WIDTH_KEY, 1, where)[0]
        if width not in WIDTHS:
            raise ValueError(
                f"{where} holds a MAR of width {width}; published widths are "
                f"{', '.join(map(str, WIDTHS))}. Give the model: "
                "load_pretrained(path, name='mar_base'), or model.name=mar_base."
            )
        name = WIDTHS[width]
    return name, {}


def _dropbox(size: str, place: str) -> Published:
    return Published(
        model=f"mar_{size}",
        url=f"https://www.dropbox.com/scl/fi/{place}&dl=1",
        file=f"mar_{size}.pth",
    )


FAMILY = Family(
    name="MAR",
    model=MAR,
    sizes={
        f"mar_{size}": {
            "hidden_size": hidden_size,
            "encoder_depth": depth,
            "decoder_depth": depth,
            "num_heads": num_heads,
            "head_width": head_width,
            "head_depth": head_depth,
        }
        for size, (hidden_size, depth, num_heads, head_width, head_depth) in SIZES.items()
    },
    published_names={f"mar_{size}": f"MAR-{size[0].upper()}" for size in SIZES},
    signs=(WIDTH_KEY, "decoder_blocks.0.norm1.weight", "diffloss.net.input_proj.weight"),
    read_sizes=read_sizes,
    published={
        "mar_base.pth": _dropbox(
            "base", "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb"
        ),
        "mar_large.pth": _dropbox(
            "large", "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt"
        ),
        "mar_huge.pth": _dropbox(
            "huge", "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o"
        ),
    },
    to_published=lambda state: {"model": state, "model_ema": state},
)
