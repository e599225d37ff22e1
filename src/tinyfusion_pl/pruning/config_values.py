"""Values in a library's config that a cut may change, and what they become."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OF_LAYERS = re.compile(r"layer|block|ind(ex|ices)|depth|idx", re.IGNORECASE)


@dataclass(frozen=True)
class Kept:
    """The blocks that stay of a stack of `depth`, ascending."""

    depth: int
    blocks: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return len(self.blocks) == self.depth

    def new_index(self, block: int) -> int | None:
        return self.blocks.index(block) if block in self.blocks else None

    def num_before(self, block: int) -> int:
        """Kept blocks before `block`."""
        return sum(kept < block for kept in self.blocks)


def leaves(config: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Settings of `config` by path: of a mapping, or of a config object with others inside it."""
    names = config if isinstance(config, Mapping) else config.to_dict()
    for name in names:
        if str(name).startswith("_"):
            continue
        value = config[name] if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def replaced(config: Any, changes: Mapping[tuple, Any]) -> Any:
    """`config` with `changes`; an object is changed in place, a mapping copied."""
    config = dict(config) if isinstance(config, Mapping) else config
    for (name, *rest), value in changes.items():
        if rest:
            inner = config[name] if isinstance(config, Mapping) else getattr(config, name)
            value = replaced(inner, {tuple(rest): value})
        if isinstance(config, dict):
            config[name] = value
        else:
            setattr(config, name, value)
    return config


def choices(
    settings: Mapping[tuple, Any], stacks: Sequence[Kept], depths: Sequence[Sequence[tuple]]
) -> Iterator[dict[tuple, Any]]:
    """Changes of `settings` for the cut of `stacks` together, likely ones first.

    Each has the new depth in one of the settings that hold it (`depths`, for each stack; one for
    all where they share it), and lists by layer and by index follow or stay. After these, integers
    below the depth that say how many first blocks are of a kind follow too.
    """
    options = [
        lists for path, value in settings.items() if (lists := _list_options(path, value, stacks))
    ]
    first = [
        (path, [stack.num_before(value)])
        for stack in stacks
        for path, value in settings.items()
        if _is_int(value) and 0 < value < stack.depth and OF_LAYERS.search(str(path[-1]))
    ]
    for extra in [[], *([path_value] for path_value in first)]:
        yield from _products(depths, stacks, [*options, *extra])


def _products(depths, stacks, options) -> Iterator[dict[tuple, Any]]:
    for paths in itertools.product(*depths):
        change: dict[tuple, Any] = {}
        for path, stack in zip(paths, stacks):
            if change.setdefault(path, len(stack.blocks)) != len(stack.blocks):
                break
        else:
            yield from ({**each, **change} for each in _assigned(options))


def _assigned(options) -> Iterator[dict[tuple, Any]]:
    for values in itertools.product(*(values for _, values in options)):
        yield {path: value for (path, _), value in zip(options, values) if value is not _UNCHANGED}


_UNCHANGED = object()


def _list_options(
    path: tuple, value: Any, stacks: Sequence[Kept]
) -> tuple[tuple, list[Any]] | None:
    """What a list may become; first what its name suggests."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    found: list[Any] = []
    for stack in stacks:
        if len(value) == stack.depth:
            found.append(type(value)(value[i] for i in stack.blocks))
        if (
            all(map(_is_int, value))
            and len(set(value)) == len(value)
            and all(0 <= v < stack.depth for v in value)
        ):
            found.append(type(value)(stack.new_index(v) for v in value if v in stack.blocks))
            shifted = [
                stack.num_before(v + 1) - 1 for v in value
            ]  # to the last kept block up to it
            if min(shifted) >= 0 and len(set(shifted)) == len(shifted):
                found.append(type(value)(shifted))
    found = [new for i, new in enumerate(found) if new not in found[:i]]
    if not found:
        return None
    return path, [*found, _UNCHANGED] if OF_LAYERS.search(str(path[-1])) else [_UNCHANGED, *found]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
