"""Taking blocks out for good (TinyFusion, section 3.2: the most probable structure is kept, everything else is removed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from tinyfusion_pl.pruning.blocks import (
    JoinedStack,
    get_module,
    get_stack,
    split_path,
    stated_units,
    unwrap,
    walk_modules,
)
from tinyfusion_pl.pruning.library_configs import (
    apply_change,
    check_fixed_blocks,
    config_changes,
)
from tinyfusion_pl.pruning.library_interface import library_root

DEPTH_NAMES = ("num_layers", "depth", "num_blocks", "n_layers", "num_hidden_layers", "n_layer")
Undo = Callable[[], None]


def remove_blocks(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> nn.Module:
    """Keep only the given blocks of each stack, in place; the others leave `model`.

    The new depth is written where a model states it: in the ``config`` of one that states its
    stacks as a mapping from path to argument
    (``STACKS = {"blocks": "depth"}``), in that of a model of diffusers or transformers (see
    `library_configs`), and in the counting attributes of the module that owns the stack. One that
    cannot state it is cut all the same (`check_library_config` says so).

    Args:
        model: The model.
        kept_blocks: For each stack path the ascending indices of the blocks that stay.

    Returns:
        `model`.

    Raises:
        ValueError: for a path without a stack, indices out of range, unordered, repeated, or none
            at all; where blocks only go together, for part of such a unit; where a block has to
            stay, for a cut that drops it.
    """
    _cut(model, kept_blocks)
    return model


@contextmanager
def blocks_removed(
    model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]
) -> Iterator[nn.Module]:
    """`model` with only these blocks while the context lasts, then as it was; no copy of the weights is made.

    Raises:
        ValueError: as `remove_blocks`.
    """
    undo = _cut(model, kept_blocks)
    try:
        yield model
    finally:
        undo()


def check_kept_blocks(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for what `remove_blocks` would refuse."""
    for path, kept in kept_blocks.items():
        stack, kept = get_stack(model, path), list(kept)
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(stack):
            raise ValueError(
                f"kept_blocks of '{path}' is {kept}; give ascending indices out of 0..{len(stack) - 1}, at least one."
            )
        if torn := [
            list(unit)
            for unit in stated_units(model, path) or ()
            if 0 < len(set(unit) & set(kept)) < len(unit)
        ]:
            raise ValueError(
                f"kept_blocks of '{path}' is {kept}, but these only go together: {', '.join(map(str, torn))}. Keep or drop "
                "each of them as a whole."
            )
    check_fixed_blocks(model, kept_blocks)


def _cut(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> Undo:
    check_kept_blocks(model, kept_blocks)
    kept_blocks = {
        path: list(kept)
        for path, kept in kept_blocks.items()
        if len(kept) < len(get_stack(model, path))
    }
    changes = config_changes(
        model, {path: kept for path, kept in kept_blocks.items() if not _stated(model, path)}
    )
    values: list[tuple[nn.Module, str, object]] = []
    undo: list[Undo] = []
    for change in changes:
        root = get_module(model, change.root)
        undo.append(_config_memory(root))
        for name, key, value in change.attributes:
            module = get_module(root, name)
            if key in vars(module):
                values.append((module, key, value))
    for path, kept in kept_blocks.items():
        if library_root(model, path) is None:
            values += _counting_attributes(model, path, kept)
    stated: dict[nn.Module, dict[str, int]] = {}  # one owner may state several stacks
    for path, kept in kept_blocks.items():
        undo.append(_shorten(get_stack(model, path), kept))
        if (argument := _stated(model, path)) is not None:
            stated.setdefault(get_module(model, split_path(path)[0]), {})[argument] = len(kept)
    values += [(owner, "config", {**owner.config, **depths}) for owner, depths in stated.items()]
    for module, key, value in values:
        undo.append(partial(setattr, module, key, getattr(module, key)))
        setattr(module, key, value)
    for change in changes:
        apply_change(model, change)

    def undo_all() -> None:
        for each in reversed(undo):
            each()

    return undo_all


def _stated(model: nn.Module, path: str) -> str | None:
    """The argument that holds the depth of a stack of one of this project's models."""
    owner_path, name = split_path(path)
    owner = get_module(model, owner_path)
    stated = getattr(owner, "STACKS", None)
    return (
        stated[name]
        if isinstance(stated, Mapping) and name in stated and hasattr(owner, "config")
        else None
    )


def _shorten(stack: nn.ModuleList | nn.Sequential | JoinedStack, kept: list[int]) -> Undo:
    lists = stack.lists if isinstance(stack, JoinedStack) else [stack]
    before = [(blocks, dict(blocks._modules)) for blocks in lists]
    for index in sorted(set(range(len(stack))) - set(kept), reverse=True):
        del stack[index]

    def undo() -> None:
        for blocks, modules in before:
            blocks._modules.clear()
            blocks._modules.update(modules)

    return undo


def _config_memory(root: nn.Module) -> Undo:
    """Gives the config of a library model its present values back."""
    if hasattr(root, "_internal_dict"):
        internal = root._internal_dict
        return lambda: setattr(root, "_internal_dict", internal)
    before = list(_config_objects(root.config))

    def undo() -> None:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)

    return undo


def _config_objects(config: object) -> Iterator[tuple[object, dict]]:
    yield config, dict(vars(config))
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _config_objects(value)


def _counting_attributes(
    model: nn.Module, path: str, kept: list[int]
) -> Iterator[tuple[nn.Module, str, object]]:
    """Attributes that count or number the blocks of a stack in a model without a library's config, with their new values."""
    owner_path, name = split_path(path)
    owner, stack = get_module(model, owner_path), get_stack(model, path)
    for key in DEPTH_NAMES:
        if type(vars(owner).get(key)) is int and vars(owner)[key] == len(stack):
            yield owner, key, len(kept)
    features = vars(owner).get("feature_info")  # timm: one entry a block
    if (
        isinstance(features, list)
        and len(features) == len(stack)
        and all(
            isinstance(info, dict) and info.get("module") == f"{name}.{i}"
            for i, info in enumerate(features)
        )
    ):
        yield (
            owner,
            "feature_info",
            [{**features[i], "module": f"{name}.{new}"} for new, i in enumerate(kept)],
        )
    numbered = [
        [m for _, m in walk_modules(unwrap(block)) if type(vars(m).get("layer_idx")) is int]
        for block in stack
    ]
    if all(m.layer_idx == i for i, modules in enumerate(numbered) for m in modules):
        for new, i in enumerate(kept):
            yield from ((module, "layer_idx", new) for module in numbered[i])
