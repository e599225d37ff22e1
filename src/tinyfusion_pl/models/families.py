"""What a state dict says of the model it is of: family, sizes, depth of each stack."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion_pl.models.registry import list_models, model_defaults, model_family

# Family -> keys that only it has. SiT's are DiT's.
MARKS = {
    "DiT or SiT": ("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"),
    "MAR": ("encoder_blocks.0.norm1.weight", "decoder_blocks.0.norm1.weight", "diffloss.net.input_proj.weight"),
    "U-ViT": ("in_blocks.0.norm1.weight", "mid_block.norm1.weight", "out_blocks.0.skip_linear.weight"),
    "U-DiT": ("encoder_level_1.0.attn1.to_qkv.weight", "latent.0.attn1.to_qkv.weight"),
    "diffusers' DiT": ("transformer_blocks.0.norm1.linear.weight", "proj_out_1.weight"),
}
MAR_WIDTHS = {768: "mar_base", 1024: "mar_large", 1280: "mar_huge"}


def family_of(keys: Iterable[str]) -> str | None:
    """A key of `MARKS`, or None."""
    keys = set(keys)
    return next((family for family, marks in MARKS.items() if keys.issuperset(marks)), None)


def predicts_variance(state: Mapping[str, Tensor]) -> bool | None:
    """Whether a DiT's or SiT's weights were trained to predict a variance, which tells a DiT; None where it cannot be seen.

    A SiT of ``learn_sigma`` drops the second half of its channels: the last layer, which begins as zeros, stays so there.
    """
    if family_of(state) != "DiT or SiT":
        return None
    weight, (_, in_channels, patch_size, _) = state["final_layer.linear.weight"], state["x_embedder.proj.weight"].shape
    if len(weight) != 2 * in_channels * patch_size**2 or not weight.any():
        return None
    return bool(weight.view(patch_size**2, 2, in_channels, -1)[:, 1].any())


def depths_of(state: Collection[str], name: str) -> dict[str, int]:
    """How deep the stacks of model `name` are in a state dict: constructor argument -> number of blocks."""
    stacks = getattr(model_family(name), "STACKS", {})
    shared = {argument for argument, times in Counter(stacks.values()).items() if times > 1}
    depths = {}
    for path, argument in stacks.items():
        num_blocks = sum(_num_blocks(state, part) for part in path.split("+"))  # lists that are one stack are joined by a plus sign
        if num_blocks and argument not in shared:
            depths[argument] = num_blocks
    return depths


def _num_blocks(state: Collection[str], path: str) -> int:
    numbers = (key[len(path) + 1:].split(".")[0] for key in state if key.startswith(f"{path}."))
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def name_and_sizes(state: Mapping[str, Tensor], path: str | Path, *, name: str | None = None,
                   given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model that a state dict without a name is of: a registered name and the arguments that its shapes show.

    A published DiT's layout is taken for a DiT, of which only the number of heads cannot be seen: it is that of the registered model of
    equal width. MAR's size is seen by its width.

    Args:
        state: In the published layout.
        path: Where it is from, for errors.
        name: The model, where the file says it and only its sizes are asked for.
        given: Arguments that the caller states: ``num_heads`` of a width that no registered model has, and ``num_classes`` where the label
            table shall have no null row.

    Raises:
        ValueError: when it cannot be told; says what to give.
    """
    family = family_of(state)
    if family == "DiT or SiT":
        sizes = _dit_sizes(state, given.get("num_classes"))
        name = name or dit_of_width(sizes)
        if "num_heads" not in given and model_defaults(name).get("hidden_size") != sizes["hidden_size"]:
            raise ValueError(f"{path} holds a DiT of width {sizes['hidden_size']}, which no registered model has, and the number of heads "
                             "cannot be seen in the weights. Give it: load_pretrained(path, num_heads=...).")
        return name, sizes
    if name is None and family == "MAR":
        name = MAR_WIDTHS.get(width := state["encoder_blocks.0.norm1.weight"].shape[0])
        if name is None:
            raise ValueError(f"{path} holds a MAR of width {width}; published are {', '.join(map(str, MAR_WIDTHS))}. {_GIVE_NAME}")
    if name is None:
        raise ValueError(f"It cannot be told from {path} which model it is of{f': its keys are those of {family}' if family else ''}. "
                         f"{_GIVE_NAME}")
    return name, depths_of(state, name)


_GIVE_NAME = ("Give the model: load_pretrained(path, name='dit_xl_2'), on the command line model.name=dit_xl_2; list_models() gives all "
              "names.")


def _dit_sizes(state: Mapping[str, Tensor], num_classes: int | None) -> dict[str, Any]:
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    sizes = {
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size, "patch_size": patch_size, "in_channels": in_channels,
        "hidden_size": hidden_size, "depth": depths_of(state, "dit_xl_2")["depth"],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size, "num_classes": rows - 1,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * in_channels * patch_size**2,
    }
    return {**sizes, "num_classes": rows, "class_dropout_prob": 0.0} if num_classes == rows else sizes


def dit_of_width(sizes: Mapping[str, Any]) -> str:
    """The registered DiT of equal width and patch, and of equal number of heads where `sizes` has it; else ``"dit"``."""
    for name in list_models("dit_*"):
        defaults = model_defaults(name)
        if all(defaults.get(size) == sizes.get(size, defaults.get(size)) for size in ("hidden_size", "patch_size", "num_heads")):
            return name
    return "dit"
