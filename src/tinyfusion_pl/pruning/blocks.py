"""Stacks of blocks in a model by their paths, and what a pattern counts in them.

A *stack* is an ``nn.ModuleList`` (or ``nn.Sequential``) of blocks, keyed by its path in the model
("blocks", "decoder.layers"). Lists of one module that form one stack are joined by a plus sign in
the path's last part ("in_blocks+out_blocks", "model.in_blocks+out_blocks").
A *unit* is what a pattern counts: one block, or several that only go together (mirrored pairs under
long skips). Modules compiled in place
are seen through: paths never have ``_orig_mod``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from tinyfusion_pl.pruning.known_models import known_units

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


def get_stack(model: nn.Module, path: str) -> Stack:
    """The stack at `path`; of several lists joined by plus signs one view.

    Raises:
        ValueError: when there is none there; names the stacks found in the model.
    """
    owner, names = split_path(path)
    lists = [_get_list(model, f"{owner}.{name}" if owner else name) for name in names.split("+")]
    return lists[0] if len(lists) == 1 else JoinedStack(lists)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or `module` itself."""
    while (inner := module._modules.get("_orig_mod")) is not None:
        module = inner
    return module


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, seen through ``torch.compile``.

    Raises:
        AttributeError: when there is none there.
    """
    module = unwrap(model)
    for name in filter(None, path.split(".")):
        if name == "_orig_mod":
            continue
        if name not in module._modules:
            raise AttributeError(f"{type(module).__name__} has no module '{name}'.")
        module = unwrap(module._modules[name])
    return module


def walk_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of `model` with its path, outer ones first, seen through ``torch.compile``."""
    model = unwrap(model)
    yield path, model
    for name, child in model._modules.items():
        if child is not None:
            yield from walk_modules(child, f"{path}.{name}" if path else name)


@contextmanager
def without_compiling(model: nn.Module) -> Iterator[None]:
    """While the context lasts, modules of `model` that were compiled in place are themselves: names and keys are the plain ones."""
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and child is not unwrap(child) and "_orig_mod" not in parent._modules
    ]
    for parent, name, child in places:
        parent._modules[name] = unwrap(child)
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def split_path(path: str) -> tuple[str, str]:
    """The path of the module that owns the stack, and the stack's name in it."""
    path = ".".join(part for part in path.split(".") if part != "_orig_mod")
    owner, _, name = path.rpartition(".")
    return owner, name


def _get_list(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    try:
        stack = get_module(model, path)
    except AttributeError:
        stack = None
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or len(stack) == 0:
        what = "nothing" if stack is None else f"a {type(stack).__name__}"
        lists = [
            name
            for name, m in walk_modules(model)
            if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1
        ]
        raise ValueError(
            f"There is {what} at '{path}' in {type(model).__name__}; a list of blocks (nn.ModuleList) was expected. "
            f"Lists found: {', '.join(map(repr, lists)) or 'none'}."
        )
    return stack


def single_units(num_blocks: int) -> Units:
    """Every block on its own."""
    return tuple((i,) for i in range(num_blocks))


def get_units(model: nn.Module, path: str, given: Sequence[Sequence[int]] | None = None) -> Units:
    """What a pattern counts in the stack at `path`: the units given, else those its owner states (`stated_units`), else every block.

    Raises:
        ValueError: for units with a block twice or out of range, and for what `stated_units`
            refuses.
    """
    num_blocks = len(get_stack(model, path))
    units = stated_units(model, path) if given is None else given
    return single_units(num_blocks) if units is None else check_units(units, num_blocks, path)


def stated_units(model: nn.Module, path: str) -> Units | None:
    """The blocks of the stack at `path` that only go together: as the module that states the stack says in its method ``units(name)``, or
    as is known of its class.

    Raises:
        ValueError: for a list that is stated as part of a joined stack.
    """
    owner_path, name = split_path(path)
    owner = get_module(model, owner_path)
    stated = getattr(owner, "STACKS", None) or ()
    if whole := [
        joined
        for joined in stated
        if name != joined and set(name.split("+")) & set(joined.split("+"))
    ]:
        raise ValueError(
            f"'{path}' is a part of the stack '{whole[0]}' of {type(owner).__name__}, whose blocks go together. Name the "
            f"whole stack: '{f'{owner_path}.' if owner_path else ''}{whole[0]}'."
        )
    if name in stated:
        return owner.units(name) if callable(getattr(owner, "units", None)) else None
    return known_units(owner, name)


def check_units(units: Sequence[Sequence[int]], num_blocks: int, path: str) -> Units:
    """`units` as tuples, each block of the stack in at most one of them.

    Blocks in no unit are never gated and always stay (the middle block of a U-ViT).
    """
    try:
        units = [[operator.index(i) for i in unit] for unit in units]
    except TypeError as error:
        raise ValueError(
            f"units of '{path}' is {units!r}; give lists of block numbers, e.g. [[0, 5], [1, 4], [2, 3]]."
        ) from error
    flat = [index for unit in units for index in unit]
    if (
        len(set(flat)) != len(flat)
        or not all(0 <= index < num_blocks for index in flat)
        or not flat
    ):
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
        raise ValueError(
            f"{what} is given per stack for {list(value)}, but not for {missing}; name each stack of {list(paths)}."
        )
    if unknown := [path for path in value if path not in paths]:
        raise ValueError(
            f"{what} is given for {unknown}, where there is no stack; the stacks are {list(paths)}."
        )
    return {path: value[path] for path in paths}
