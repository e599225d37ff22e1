"""Finding the stacks of blocks in a model, and naming their members.

A *stack* is an ``nn.ModuleList`` (or ``nn.Sequential``) of blocks, keyed by its path in the model ("blocks", "decoder.layers"). A *unit*
is what a pattern counts: one block, or several that only go together (mirrored pairs under long skips).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Units = tuple[tuple[int, ...], ...]


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The stacks of blocks of `model`, by path.

    A model that states them (attribute ``STACKS``, its paths) is believed. Otherwise: every outermost list of at least two modules with
    parameters that all have one class; of these the longest, and those with blocks of the same class.
    """
    if stated := getattr(model, "STACKS", None):
        return {path: get_stack(model, path) for path in stated}
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if stated := getattr(module, "STACKS", None):
            found.update({f"{path}.{name}" if path else name: get_stack(module, name) for name in stated})
        elif isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= 2:
            # An adapted linear layer has children, but is no block.
            if len({type(block) for block in module}) == 1 and any(True for _ in module[0].children()) \
                    and not isinstance(module[0], BaseTunerLayer):
                found[path] = module
    if not found:
        return {}
    block_class = type(max(found.values(), key=len)[0])
    return {path: stack for path, stack in found.items() if type(stack[0]) is block_class}


def get_stack(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    """The stack at `path`.

    Raises:
        ValueError: when there is none there; names the stacks found in the model.
    """
    try:
        stack = model.get_submodule(path)
    except AttributeError:
        stack = None
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or len(stack) == 0:
        what = "nothing" if stack is None else f"a {type(stack).__name__}"
        lists = [name for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
        raise ValueError(
            f"There is {what} at '{path}' in {type(model).__name__}; a list of blocks (nn.ModuleList) was expected. "
            f"Lists found: {', '.join(map(repr, lists)) or 'none'}."
        )
    return stack


def resolve_stacks(model: nn.Module, stacks: str | Sequence[str] | None) -> list[str]:
    """Paths of the stacks to prune: those given, checked, or those found.

    Raises:
        ValueError: when a path holds no list of blocks, or none is given and none found.
    """
    if stacks is None:
        if not (paths := list(find_stacks(model))):
            raise ValueError(
                f"No list of equal blocks was found in {type(model).__name__}. Name its path, e.g. stacks='model.blocks'."
            )
        return paths
    paths = [stacks] if isinstance(stacks, str) else list(stacks)
    for path in paths:
        get_stack(model, path)
    return paths


def single_units(num_blocks: int) -> Units:
    """Every block on its own."""
    return tuple((i,) for i in range(num_blocks))


def check_units(units: Sequence[Sequence[int]], num_blocks: int, path: str) -> Units:
    """`units` as tuples, each block of the stack in at most one of them.

    Blocks in no unit are never gated and always stay (the middle block of a U-ViT).
    """
    flat = [index for unit in units for index in unit]
    if len(set(flat)) != len(flat) or not all(0 <= index < num_blocks for index in flat) or not flat:
        raise ValueError(
            f"Units {[list(u) for u in units]} of stack '{path}': each block 0..{num_blocks - 1} may be in at most one unit."
        )
    return tuple(tuple(unit) for unit in units)


def common_root(paths: Sequence[str]) -> str:
    """Path of the innermost module that owns every stack in `paths` (its ``forward`` is the top-level forward of the stacks)."""
    owners = [path.split(".")[:-1] for path in paths]
    root = []
    for parts in zip(*owners):
        if len(set(parts)) > 1:
            break
        root.append(parts[0])
    return ".".join(root)


def by_path(value, paths: Sequence[str], what: str) -> dict:
    """`value` for each path: a mapping must name each path and nothing else, anything else holds for all of them."""
    if not isinstance(value, Mapping):
        return {path: value for path in paths}
    if missing := [path for path in paths if path not in value]:
        raise ValueError(f"{what} is given per stack for {list(value)}, but not for {missing}; name each stack of {list(paths)}.")
    if unknown := [path for path in value if path not in paths]:
        raise ValueError(f"{what} is given for {unknown}, where there is no stack; the stacks are {list(paths)}.")
    return {path: value[path] for path in paths}
