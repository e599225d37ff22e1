"""Taking blocks out for good (TinyFusion, section 3.2: the most probable structure is kept, everything else is removed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from tinyfusion_pl.pruning.blocks import get_stack


def remove_blocks(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> nn.Module:
    """Keep only the given blocks of each stack, in place; the others leave `model`.

    Where a model states its stacks as a mapping from path to constructor argument (``STACKS = {"blocks": "depth"}``) and has a ``config``,
    the new depth is written there.

    Args:
        model: The model.
        kept_blocks: For each stack path the ascending indices of the blocks that stay.

    Returns:
        `model`.

    Raises:
        ValueError: for a path without a stack, indices out of range, unordered, repeated, or none at all.
    """
    for path, kept in kept_blocks.items():
        stack, kept = get_stack(model, path), list(kept)
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(stack):
            raise ValueError(f"kept_blocks of '{path}' is {kept}; give ascending indices out of 0..{len(stack) - 1}, at least one.")
        for index in sorted(set(range(len(stack))) - set(kept), reverse=True):
            del stack[index]
        owner_path, _, name = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        stated = getattr(owner, "STACKS", None)
        if isinstance(stated, Mapping) and name in stated and hasattr(owner, "config"):
            owner.config = {**owner.config, stated[name]: len(kept)}
    return model
