"""Taking blocks out for good (TinyFusion, section 3.2: the most probable structure is kept, everything else is removed)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from tinyfusion_pl.pruning.blocks import get_stack, split_path, stated_units


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
        ValueError: for a path without a stack, indices out of range, unordered, repeated, or none at all; where the model states blocks
            that only go together, for part of such a unit.
    """
    for path, kept in kept_blocks.items():
        stack, kept = get_stack(model, path), list(kept)
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(stack):
            raise ValueError(f"kept_blocks of '{path}' is {kept}; give ascending indices out of 0..{len(stack) - 1}, at least one.")
        if torn := [list(unit) for unit in stated_units(model, path) or () if 0 < len(set(unit) & set(kept)) < len(unit)]:
            raise ValueError(f"kept_blocks of '{path}' is {kept}, but these only go together: {', '.join(map(str, torn))}. Keep or drop "
                             "each of them as a whole.")
        for index in sorted(set(range(len(stack))) - set(kept), reverse=True):
            del stack[index]
        owner_path, name = split_path(path)
        owner = model.get_submodule(owner_path)
        stated = getattr(owner, "STACKS", None)
        if isinstance(stated, Mapping) and name in stated and hasattr(owner, "config"):
            owner.config = {**owner.config, stated[name]: len(kept)}
    return model


@contextmanager
def temporarily_cut(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, `model` has only the given blocks; everything is restored afterwards. No weights are copied."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    before = [(m, dict(m._modules)) for m in lists]
    try:
        remove_blocks(model, kept_blocks)
        yield
    finally:
        for each, modules in before:
            each._modules.clear()
            each._modules.update(modules)
