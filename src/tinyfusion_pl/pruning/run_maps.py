"""A removed run of blocks may leave a linear map: x + W x + b, per token, in its place.

The map is a submodule of the kept block that the run followed (of the first kept block where it
came before all), and part of what that block computes. So stacks keep their length, blocks their
place, class and parameter names; whoever gates, pairs or removes the block takes its maps along;
and state dicts, optimizers and counts of parameters have them without knowing of them.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.pruning.blocks import get_module, unwrap, walk_modules
from tinyfusion_pl.pruning.calls import block_signature

POSITIONS = {"before": "run_before", "after": "run_after"}  # of a map, to the name of the submodule
Run = tuple[int, int]  # first and last block


@dataclass(frozen=True)
class RunMap:
    """Where a map stands: path of the kept block in the shallow model, ``"before"`` or ``"after"`` it, and its width."""

    module: str
    position: str
    width: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, an entry of ``run_maps`` in a record."""
        return asdict(self)


class MappedForward:
    """Stands in for the ``forward`` of a block of one stream with maps; hidden states are its first argument and its output."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.original = block, block.forward
        self.name = list(block_signature(block).parameters)[1]  # behind self

    def install(self) -> None:
        # A bound method, not a closure: copy.deepcopy then binds the copy to the copied block.
        self.block.forward = types.MethodType(MappedForward.forward, self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if "run_before" in self.block._modules:
            if args:
                args = (add_map(self.block.run_before, args[0]), *args[1:])
            else:
                kwargs = {**kwargs, self.name: add_map(self.block.run_before, kwargs[self.name])}
        x = self.original(*args, **kwargs)
        return add_map(self.block.run_after, x) if "run_after" in self.block._modules else x


def add_map(linear: nn.Module, x: Tensor) -> Tensor:
    """X + W x + b for tokens `x` (N, T, D)."""
    return x + linear(x)


def attach_map(block: nn.Module, position: str, width: int) -> nn.Linear:
    """Give `block` a map, zero at first, at `position`; returns it.

    Raises:
        ValueError: for a block that has one there.
    """
    block = unwrap(block)
    if POSITIONS[position] in block._modules:
        raise ValueError(f"The {type(block).__name__} has a map {position} it already.")
    if not maps_of_block(block):
        MappedForward(block).install()
    like = next(block.parameters())
    linear = nn.utils.skip_init(
        nn.Linear, width, width, device=like.device, dtype=like.dtype
    )  # draws no random numbers
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    block.add_module(POSITIONS[position], linear)
    return linear


def attach_maps(model: nn.Module, maps: Sequence[RunMap]) -> nn.Module:
    """Give `model` these maps, zero at first, in place.

    Raises:
        ValueError: for a path without a module, or with a map already.
    """
    for each in maps:
        try:
            block = get_module(model, each.module)
        except AttributeError as error:
            raise ValueError(f"There is no block '{each.module}' for a map: {error}") from error
        attach_map(block, each.position, each.width)
    return model


def maps_of_block(block: nn.Module) -> dict[str, nn.Linear]:
    """The maps of `block` by position."""
    modules = unwrap(block)._modules
    return {
        position: modules[name]
        for position, name in POSITIONS.items()
        if isinstance(modules.get(name), nn.Linear)
    }


def get_maps(model: nn.Module) -> list[RunMap]:
    """The maps in `model`."""
    return [
        RunMap(path, position, linear.in_features)
        for path, module in walk_modules(model)
        if _is_mapped(module)
        for position, linear in maps_of_block(module).items()
    ]


def _is_mapped(module: nn.Module) -> bool:
    """Whether its maps are of this file, and not modules of its own of the same name."""
    own = module.__dict__.get("forward")
    while (holder := getattr(own, "__self__", None)) is not None:
        if isinstance(holder, MappedForward):
            return True
        own = getattr(holder, "original", None)  # of a gate around it
    return False


def removed_runs(kept_blocks: Sequence[int], num_blocks: int) -> list[Run]:
    """First and last block of each run between the kept blocks (ascending) of a stack of `num_blocks`."""
    edges = [-1, *kept_blocks, num_blocks]
    return [(a + 1, b - 1) for a, b in zip(edges, edges[1:]) if b - a > 1]


def get_place(run: Run, kept_blocks: Sequence[int]) -> tuple[int, str]:
    """The place in the shallow stack of the block that the run's map is of, and the map's position."""
    num_before = sum(block < run[0] for block in kept_blocks)
    return (num_before - 1, "after") if num_before else (0, "before")


def maps_for(
    kept_blocks: Mapping[str, Sequence[int]],
    num_blocks: Mapping[str, int],
    widths: Mapping[str, int],
) -> list[RunMap]:
    """The maps of all removed runs, by stack path."""
    found = []
    for path, kept in kept_blocks.items():
        for run in removed_runs(kept, num_blocks[path]):
            place, position = get_place(run, kept)
            found.append(RunMap(f"{path}.{place}", position, widths[path]))
    return found


def copy_maps(source: nn.Module, block: nn.Module) -> None:
    """Give `block` the maps that `source`, a block of the same class, has."""
    for position, linear in maps_of_block(source).items():
        attach_map(block, position, linear.in_features)
