"""How a DiT or SiT is recognized by its state dict, and what can be read from it.

SiT has DiT's keys and shapes; only the trained values of the final layer tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.registry import list_models, model_defaults
from tinyfusion_pl.models.state_shapes import count_blocks, get_shape

SIGNS = (
    "x_embedder.proj.weight",
    "blocks.0.adaLN_modulation.1.weight",
    "final_layer.linear.weight",
)
LABEL_TABLE = "y_embedder.embedding_table.weight"
# Tensors that sizes are read from -> number of dimensions.
SIZED = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    LABEL_TABLE: 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}


def read_sizes(
    state: Mapping[str, Tensor], where: str | Path, *, name: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Registered name and sizes of a DiT or SiT.

    The shapes show everything but the number of heads, which is that of the registered model of
    equal width.

    Raises:
        ValueError: No registered model has this width and ``num_heads`` is not in `given`.
        ArtifactError: A tensor is missing or has an impossible shape.
    """
    if missing := [key for key in SIZED if key not in state]:
        raise ArtifactError(
            f"{where} has the keys of a DiT or SiT, but lacks {', '.join(missing)}, which its "
            "sizes are read from. Give a complete checkpoint."
        )
    shapes = {key: get_shape(state, key, num, where) for key, num in SIZED.items()}
    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    sizes = {
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": count_blocks(state, "blocks", where),
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / hidden_size,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * in_channels * patch_size**2,
    }
    name = name or dit_of_width(sizes)
    if "num_heads" not in given and model_defaults(name).get("hidden_size") != hidden_size:
        raise ValueError(
            f"{where} holds a DiT of width {hidden_size}, which no registered model has, and the "
            "weights do not show the number of heads. Give it: "
            "load_pretrained(path, num_heads=...)."
        )
    return name, sizes


def dit_of_width(sizes: Mapping[str, Any]) -> str:
    """The registered DiT with the same width, patch size and, where given, number of heads.

    ``"dit"`` where there is none.
    """
    for name in list_models("dit_*"):
        defaults = model_defaults(name)
        if all(
            defaults.get(size) == sizes.get(size, defaults.get(size))
            for size in ("hidden_size", "patch_size", "num_heads")
        ):
            return name
    return "dit"


def predicts_variance(state: Mapping[str, Tensor]) -> bool | None:
    """Whether DiT or SiT weights were trained to predict a variance; None where this is unknown.

    Only DiT is. With ``learn_sigma``, SiT drops the second half of the output channels: that half
    of the final layer is initialized to zero and stays zero.
    """
    if not state.keys() >= set(SIGNS):
        return None
    weight, patches = state["final_layer.linear.weight"], state["x_embedder.proj.weight"]
    if weight.ndim != 2 or patches.ndim != 4:
        return None
    _, in_channels, patch_size, _ = patches.shape
    if not len(weight) or len(weight) != 2 * in_channels * patch_size**2 or not weight.any():
        return None
    return bool(weight.view(patch_size**2, 2, in_channels, -1)[:, 1].any())


def refuse_sit_weights(state: Mapping[str, Tensor], name: str, where: str | Path) -> None:
    """Raise `ValueError` for weights of a SiT that would be loaded as a DiT."""
    if predicts_variance(state) is False:
        raise ValueError(
            f"{where} looks like a SiT checkpoint: the variance half of its final layer is all "
            "zeros. Give name=sit_xl_2 (model=sit_xl_2), or another SiT's name."
        )
