"""Finding the stacks of blocks in a model, and naming their members.

A *stack* is an ``nn.ModuleList`` (or ``nn.Sequential``) of blocks, keyed by its path in the model ("blocks", "decoder.layers"). Lists of
one module that form one stack are joined by a plus sign in the path's last part ("in_blocks+out_blocks", "model.in_blocks+out_blocks").
A *unit* is what a pattern counts: one block, or several that only go together (mirrored pairs under long skips).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Units = tuple[tuple[int, ...], ...]


class JoinedStack:
    """Several lists of blocks seen as one: length, iteration, indexing and deletion by the place in all of them together."""

    def __init__(self, lists: Sequence[nn.ModuleList | nn.Sequential]) -> None:
        self.lists = lists

    def __len__(self) -> int:
        return sum(map(len, self.lists))

    def __iter__(self) -> Iterator[nn.Module]:
        return itertools.chain.from_iterable(self.lists)

    def __getitem__(self, index: int) -> nn.Module:
        blocks, place = self._place(index)
        return blocks[place]

    def __delitem__(self, index: int) -> None:
        blocks, place = self._place(index)
        del blocks[place]

    def _place(self, index: int) -> tuple[nn.ModuleList | nn.Sequential, int]:
        place = range(len(self))[index]  # negative ones count from the end; an IndexError beyond
        for blocks in self.lists:
            if place < len(blocks):
                break
            place -= len(blocks)
        return blocks, place


Stack = nn.ModuleList | nn.Sequential | JoinedStack


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks of blocks of `model`, by path.

    A module that states them (attribute ``STACKS``, its paths) is believed, `model` itself or the outermost in it. Where none does: every
    outermost list of at least two modules with parameters that all have one class; of these the longest, and those with blocks of the same
    class.
    """
    stating: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if getattr(module, "STACKS", None) and not any(outer == "" or path.startswith(f"{outer}.") for outer in stating):
            stating[path] = module
    if stating:
        return {f"{path}.{name}" if path else name: get_stack(module, name) for path, module in stating.items() for name in module.STACKS}
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= 2:
            # An adapted linear layer has children, but is no block.
            if len({type(block) for block in module}) == 1 and any(True for _ in module[0].children()) \
                    and not isinstance(module[0], BaseTunerLayer):
                found[path] = module
    if not found:
        return {}
    block_class = type(max(found.values(), key=len)[0])
    return {path: stack for path, stack in found.items() if type(stack[0]) is block_class}


def get_stack(model: nn.Module, path: str) -> Stack:
    """The stack at `path`; of several lists joined by plus signs one view.

    Raises:
        ValueError: when there is none there; names the stacks found in the model.
    """
    owner, names = split_path(path)
    lists = [_get_list(model, f"{owner}.{name}" if owner else name) for name in names.split("+")]
    return lists[0] if len(lists) == 1 else JoinedStack(lists)


def split_path(path: str) -> tuple[str, str]:
    """The path of the module that owns the stack, and the stack's name in it."""
    owner, _, name = path.rpartition(".")
    return owner, name


def _get_list(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
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
    if not paths:
        raise ValueError("stacks is empty; give the path of a list of blocks, e.g. 'model.blocks', or leave it out to have it found.")
    for path in paths:
        get_stack(model, path)
    return paths


def single_units(num_blocks: int) -> Units:
    """Every block on its own."""
    return tuple((i,) for i in range(num_blocks))


def units_of(model: nn.Module, path: str, given: Sequence[Sequence[int]] | None = None) -> Units:
    """What a pattern counts in the stack at `path`: the units given, else those its owner states (`stated_units`), else every block.

    Raises:
        ValueError: for units with a block twice or out of range, and for what `stated_units` refuses.
    """
    num_blocks = len(get_stack(model, path))
    units = stated_units(model, path) if given is None else given
    return single_units(num_blocks) if units is None else check_units(units, num_blocks, path)


def stated_units(model: nn.Module, path: str) -> Units | None:
    """The blocks of the stack at `path` that only go together, as the module says that states the stack: its method ``units(name)``.

    Raises:
        ValueError: for a list that is stated as part of a joined stack.
    """
    owner_path, name = split_path(path)
    owner = model.get_submodule(owner_path)
    stated = getattr(owner, "STACKS", None) or ()
    if whole := [joined for joined in stated if name != joined and set(name.split("+")) & set(joined.split("+"))]:
        raise ValueError(f"'{path}' is a part of the stack '{whole[0]}' of {type(owner).__name__}, whose blocks go together. Name the "
                         f"whole stack: '{f'{owner_path}.' if owner_path else ''}{whole[0]}'.")
    return owner.units(name) if name in stated and callable(getattr(owner, "units", None)) else None


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
