"""What is pruned in a model: its stacks, each with pattern, units and streams, held against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinyfusion_pl.pruning.blocks import by_path, get_module, get_stack, get_units
from tinyfusion_pl.pruning.budget import Budget
from tinyfusion_pl.pruning.discovery import resolve_stacks
from tinyfusion_pl.pruning.library_configs import library_root
from tinyfusion_pl.pruning.patterns import Pattern


@dataclass(frozen=True)
class Plan:
    """What is pruned: the module that holds all stacks, and pattern, units and streams by path inside it."""

    root: str
    patterns: dict[str, Pattern]
    units: dict[str, Any]
    streams: dict[str, list[str]]

    def path(self, inside: str) -> str:
        """Path of a stack in the module that was planned for."""
        return f"{self.root}.{inside}" if self.root else inside


def find_paths(
    module: nn.Module, stacks: str | Sequence[str] | None, *, budget: Budget
) -> list[str]:
    """Paths of the stacks to prune in `module`: those named, those that `budget` names, or those found.

    Raises:
        ValueError: when there are none.
    """
    return [
        p
        for p in resolve_stacks(module, stacks, pattern=budget.stated)
        if not p.startswith("depth_gates")
    ]


def make_plan(
    module: nn.Module, paths: Sequence[str], *, budget: Budget, units: Any, streams: Mapping[str, Sequence[str]] | None, held: bool = False,
) -> Plan:  # fmt: skip
    """The `Plan` for the stacks at `paths`; changes nothing. `units` and `streams` as `DepthPruningCallback` takes them, `held`
    as `DepthPruner`.

    Raises:
        ValueError: when they do not fit the model; says what would.
    """
    owners: dict[int, str] = {}
    for path in paths:
        blocks = list(get_stack(module, path))
        if again := [
            i for i, block in enumerate(blocks) if any(block is other for other in blocks[:i])
        ]:
            raise ValueError(f"The stack {path!r} runs one block several times (block {again[0]} is one before it), so that no block of it "
                             "can go alone. Prune a list of different blocks.")  # fmt: skip
        for block in blocks:
            if (owner := owners.setdefault(id(block), path)) != path or list(paths).count(path) > 1:
                raise ValueError(f"The stacks {owner!r} and {path!r} hold the same blocks, which only one pattern can be for. Name each "
                                 "block list once.")  # fmt: skip
    root = _get_root_path(module, paths) if held else ""
    inside = {
        path: path.removeprefix(f"{root}.") if root else path for path in paths
    }  # a mapping may be keyed by either

    def of(given: Any, what: str) -> dict[str, Any]:
        renamed = (
            {inside.get(path, path): each for path, each in given.items()}
            if isinstance(given, Mapping)
            else given
        )
        return by_path(renamed, list(inside.values()), what)

    budget.check_stacks(list(inside.values()))
    stated, patterns = of(budget.stated, budget.what), {}
    unit_lists = of(units, "units")
    named = {inside.get(path, path): list(names) for path, names in (streams or {}).items()}
    if unknown := [path for path in named if path not in stated]:
        raise ValueError(
            f"streams is given for {unknown}, where there is no stack; the stacks are {list(inside)}."
        )
    for path, short in inside.items():
        counted = get_units(module, path, unit_lists[short])
        patterns[short] = budget.pattern(stated[short], len(counted), path=path)
        try:
            patterns[short].groups(len(counted))
        except ValueError as error:
            what = (
                ""
                if all(len(unit) == 1 for unit in counted)
                else f", where a pattern counts {len(counted)} units of several blocks"
            )
            raise ValueError(
                f"Stack '{path}'{what}: {error} Each stack may have a pattern of its own, given by path."
            ) from error
    return Plan(root, patterns, unit_lists, named)


def _get_root_path(module: nn.Module, paths: Sequence[str]) -> str:
    """Path of the module that becomes the shallow model: the child of `module` that holds all stacks, or inside it the library model that
    does, when nothing beside it trains (a pipeline's frozen encoders are no part of what is
    pruned).
    """
    heads = {path.partition(".")[0] for path in paths}
    head = heads.pop() if len(heads) == 1 and all("." in path for path in paths) else ""
    found = {library_root(module, path) for path in paths}
    if (
        len(found) == 1
        and (inner := found.pop()) is not None
        and inner.startswith(f"{head}." if head else "")
    ):
        inside = {id(p) for p in get_module(module, inner).parameters()}
        if not any(
            p.requires_grad and id(p) not in inside for p in get_module(module, head).parameters()
        ):
            return inner
    return head
