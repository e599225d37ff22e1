"""What a state dict says of the model it is of: family, sizes, depth of each stack."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.label_tables import label_arguments
from tinyfusion_pl.models.prefixes import NUM_NAMED, plain_names, prefixes_with, under_prefix
from tinyfusion_pl.models.registry import list_models, model_arguments, model_defaults, model_family

# Family -> keys that only it has. SiT's are DiT's.
MARKS = {
    "DiT or SiT": (
        "x_embedder.proj.weight",
        "blocks.0.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    ),
    "MAR": (
        "encoder_blocks.0.norm1.weight",
        "decoder_blocks.0.norm1.weight",
        "diffloss.net.input_proj.weight",
    ),
    "U-ViT": (
        "in_blocks.0.norm1.weight",
        "mid_block.norm1.weight",
        "out_blocks.0.skip_linear.weight",
    ),
    "U-DiT": ("encoder_level_1.0.attn1.to_qkv.weight", "latent.0.attn1.to_qkv.weight"),
    "diffusers' DiT": ("transformer_blocks.0.norm1.linear.weight", "proj_out_1.weight"),
}
# What the sizes of a DiT or SiT are read from -> number of axes.
DIT_SIZED = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
BLOCK_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
MAR_WIDTHS = {768: "mar_base", 1024: "mar_large", 1280: "mar_huge"}


def detect_family(keys: Iterable[str]) -> str | None:
    """A key of `MARKS`, or None."""
    keys = set(keys)
    return next((family for family, marks in MARKS.items() if keys.issuperset(marks)), None)


def plain_state(
    state: Mapping[str, Tensor], where: str | Path, *, name: str | None = None
) -> dict[str, Tensor]:
    """`state` without what is before the names that a family has, or before the stacks of the model `name`; as it is where none is seen.

    Raises:
        ValueError: when there are two places where such a model begins.
    """
    plain = plain_names(state)
    own = [marks for family, marks in MARKS.items() if prefixes_with(plain, marks)]
    if own:
        return _from_place(state, plain, own[0], where)
    parts = (
        [part for path in getattr(model_family(name), "STACKS", {}) for part in path.split("+")]
        if name is not None
        else []
    )
    for part in parts:
        firsts = {
            found[1]
            for key in plain
            if (found := re.search(rf"(?:^|\.)({re.escape(part)}\.0\..+)", key))
        }
        if firsts:
            return _from_place(state, plain, [min(firsts)], where)
    return dict(state)


def _from_place(
    state: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    marks: Collection[str],
    where: str | Path,
) -> dict[str, Tensor]:
    return (
        dict(state)
        if prefixes_with(plain, marks) == [""] and plain.keys() == state.keys()
        else under_prefix(state, marks, where)
    )


def _shape(
    state: Mapping[str, Tensor], key: str, num_axes: int, where: str | Path
) -> tuple[int, ...]:
    shape = tuple(state[key].shape)
    if len(shape) != num_axes or 0 in shape:
        raise ArtifactError(
            f"{where} holds {key} of shape {shape}; {num_axes} axes, none of them empty, were expected. It "
            "is damaged, or of "
            "another model."
        )
    return shape


def predicts_variance(state: Mapping[str, Tensor]) -> bool | None:
    """Whether a DiT's or SiT's weights were trained to predict a variance, which tells a DiT; None where it cannot be seen.

    A SiT of ``learn_sigma`` drops the second half of its channels: the last layer, which begins as zeros, stays so there.
    """
    if detect_family(state) != "DiT or SiT":
        return None
    weight, patches = state["final_layer.linear.weight"], state["x_embedder.proj.weight"]
    if weight.ndim != 2 or patches.ndim != 4:
        return None
    _, in_channels, patch_size, _ = patches.shape
    if not len(weight) or len(weight) != 2 * in_channels * patch_size**2 or not weight.any():
        return None
    return bool(weight.view(patch_size**2, 2, in_channels, -1)[:, 1].any())


def get_depths(
    state: Collection[str], name: str, where: str | Path = "The state dict"
) -> dict[str, int]:
    """How deep the stacks of model `name` are in a state dict: constructor argument -> number of blocks.

    Raises:
        ArtifactError: for blocks that are not numbered 0, 1, 2, ...
    """
    stacks = getattr(model_family(name), "STACKS", {})
    shared = {argument for argument, times in Counter(stacks.values()).items() if times > 1}
    depths = {}
    for path, argument in stacks.items():
        num_blocks = sum(
            _num_blocks(state, part, where) for part in path.split("+")
        )  # lists of one stack are joined by a plus sign
        if num_blocks and argument not in shared:
            depths[argument] = num_blocks
    return depths


def _num_blocks(state: Collection[str], path: str, where: str | Path) -> int:
    parts = (key[len(path) + 1 :].split(".")[0] for key in state if key.startswith(f"{path}."))
    numbers = {int(part) for part in parts if BLOCK_NUMBER.fullmatch(part)}
    if numbers and len(numbers) != max(numbers) + 1:
        lacking = next(number for number in range(len(numbers) + 1) if number not in numbers)
        raise ArtifactError(
            f"{where} holds {len(numbers)} blocks of '{path}' up to number {max(numbers)}, and no "
            f"{path}.{lacking}. Blocks are "
            "numbered 0, 1, 2, ... without a gap: the file is damaged, or its blocks were dropped and not renumbered."
        )
    return len(numbers)


def get_arguments(
    state: Mapping[str, Tensor], name: str, path: str | Path, *, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What a state dict says of the arguments of the model `name`: depths, and whether its label table has a null row.

    Raises:
        ArtifactError: for blocks that are not numbered 0, 1, 2, ...
    """
    return {**get_depths(state, name, path), **_labels(state, name, path, given, named=True)}


def _labels(
    state: Mapping[str, Tensor],
    name: str,
    path: str | Path,
    given: Mapping[str, Any],
    *,
    named: bool,
) -> dict[str, Any]:
    taken = model_arguments(name)
    if not {"num_classes", "class_dropout_prob"} <= taken.keys():
        return {}
    return label_arguments(
        state, {"num_classes": taken["num_classes"].default, **given}, path, named=named
    )


def name_and_sizes(
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    name: str | None = None,
    given: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
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
        ArtifactError: for a state dict that lacks what sizes are read from, or has it in an impossible shape; names the keys.
    """
    family = detect_family(state)
    if family == "DiT or SiT":
        sizes = _dit_sizes(state, path)
        name = name or dit_of_width(sizes)
        if (
            "num_heads" not in given
            and model_defaults(name).get("hidden_size") != sizes["hidden_size"]
        ):
            raise ValueError(
                f"{path} holds a DiT of width {sizes['hidden_size']}, which no registered model has, and the number of heads "
                "cannot be seen in the weights. Give it: load_pretrained(path, num_heads=...)."
            )
        return name, {**sizes, **_labels(state, name, path, given, named=False)}
    if name is None and family == "MAR":
        width = _shape(state, "encoder_blocks.0.norm1.weight", 1, path)[0]
        name = MAR_WIDTHS.get(width)
        if name is None:
            raise ValueError(
                f"{path} holds a MAR of width {width}; published are {', '.join(map(str, MAR_WIDTHS))}. {_GIVE_NAME}"
            )
    if name is None:
        raise ValueError(
            f"It cannot be told from {path} which model it is of{_hint(state, family)}. {_GIVE_NAME}"
        )
    return name, get_arguments(state, name, path, given=given)


def _hint(state: Mapping[str, Tensor], family: str | None) -> str:
    """What the keys have in common with those of a family, for an error."""
    if family is not None:
        return f": its keys are those of {family}"
    for each, marks in MARKS.items():
        if not (has := [mark for mark in marks if mark in state]):
            continue
        return f": it has the {has[0]} of {each}, but lacks {', '.join(mark for mark in marks if mark not in state)}"
    return f"; it has {', '.join(list(state)[:NUM_NAMED])}"


_GIVE_NAME = (
    "Give the model: load_pretrained(path, name='dit_xl_2'), on the command line model.name=dit_xl_2; list_models() gives all "
    "names."
)


def _dit_sizes(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    if lacking := [key for key in DIT_SIZED if key not in state]:
        raise ArtifactError(
            f"{path} has the keys of a DiT or SiT, but lacks {', '.join(lacking)}, from which its sizes are read. Give a "
            "whole checkpoint."
        )
    shapes = {key: _shape(state, key, num_axes, path) for key, num_axes in DIT_SIZED.items()}
    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    return {
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": get_depths(state, "dit_xl_2", path)["depth"],
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / hidden_size,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * in_channels * patch_size**2,
    }


def dit_of_width(sizes: Mapping[str, Any]) -> str:
    """The registered DiT of equal width and patch, and of equal number of heads where `sizes` has it; else ``"dit"``."""
    for name in list_models("dit_*"):
        defaults = model_defaults(name)
        if all(
            defaults.get(size) == sizes.get(size, defaults.get(size))
            for size in ("hidden_size", "patch_size", "num_heads")
        ):
            return name
    return "dit"
