"""Finding what makes the config of another library's model that of its cut.

Which settings hold the depth of a stack is not guessed from their names: the settings that fit are
tried, the model is built from them,
and its keys and shapes must be those of the cut model. Lists of indices and of one entry a layer
follow the kept blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tinyfusion_pl.pruning.blocks import get_module, get_stack, split_path
from tinyfusion_pl.pruning.config_values import Kept, choices
from tinyfusion_pl.pruning.library_interface import (
    build_from,
    difference,
    get_settings,
    plain_shapes,
    rebuilt,
)

MAX_BUILDS = 200  # of one stack; each takes some hundredths of a second


@dataclass
class ConfigChange:
    """What makes the config of one library model that of its cut: settings by path, and plain attributes by module."""

    root: str
    settings: dict[tuple, Any] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(
        default_factory=list
    )  # module in the uncut model, name, value
    reason: str | None = None  # why there is none


def find_change(
    model: nn.Module, root: str, kept_blocks: Mapping[str, Sequence[int]]
) -> ConfigChange:
    """The change of the config of the library model at `root` for the cut of its stacks `kept_blocks` (paths from `model` on)."""
    owner = get_module(model, root)
    kept = {
        path.removeprefix(f"{root}.") if root else path: Kept(
            len(get_stack(model, path)), tuple(blocks)
        )
        for path, blocks in kept_blocks.items()
    }
    dense, reason = rebuilt(owner)
    if reason is not None:
        return ConfigChange(
            root, reason=f"its config does not describe it even before the cut: {reason}"
        )
    search = _Search(owner, dense)
    settings: dict[tuple, Any] = {}
    for path, blocks in kept.items():
        change = search.solve({path: blocks})
        if change is None:
            settings = {}
            break
        settings |= change
    if not settings or search.try_settings(settings, kept) is not None:
        joint = search.solve(kept) if len(kept) > 1 else None
        if joint is None:
            return ConfigChange(root, reason=search.reason)
        settings = joint
    search.try_settings(settings, kept)
    return ConfigChange(root, settings, search.attributes)


class _Search:
    """Tries changes of the config of `owner` until the model built from it is that of a cut."""

    def __init__(self, owner: nn.Module, dense: nn.Module) -> None:
        self.owner, self.settings = owner, get_settings(owner)
        self.shapes, self.plain = plain_shapes(dense), _attributes(dense)
        self.closest: str | None = None  # why the first change that was tried does not fit
        self.attributes: list[tuple[str, str, Any]] = []

    def solve(self, kept: Mapping[str, Kept]) -> dict[tuple, Any] | None:
        """The first change that fits; ones with fewer settings come first. Remembers why the closest did not fit."""
        kept = {path: blocks for path, blocks in kept.items() if not blocks.is_whole}
        if not kept:
            return {}
        depths = [self.depth_settings(path, blocks.depth) for path, blocks in kept.items()]
        for change in itertools.islice(
            choices(self.settings, list(kept.values()), depths), MAX_BUILDS
        ):
            if (reason := self.try_settings(change, kept)) is None:
                return change
            if self.closest is None:
                told = ", ".join(
                    f"{'.'.join(map(str, path))}={value}" for path, value in change.items()
                )
                self.closest = f"with {told} it is another model ({reason})"
        return None

    @property
    def reason(self) -> str:
        return self.closest or "no setting of its config holds the depth of this stack alone"

    def depth_settings(self, path: str, depth: int) -> list[tuple]:
        """Settings of the old depth that make the stack longer or shorter; found by trying each."""
        found = []
        for setting, value in self.settings.items():
            if type(value) is int and value == depth:
                if any(self._length(path, {setting: new}) == new for new in (depth + 1, depth - 1)):
                    found.append(setting)
        return found

    def _length(self, path: str, change: Mapping[tuple, Any]) -> int | None:
        try:
            return len(get_stack(build_from(self.owner, change, from_file=False), path))
        except (
            Exception
        ):  # whatever a library's constructor raises: lists by layer may not go with another depth
            return None

    def try_settings(self, change: Mapping[tuple, Any], kept: Mapping[str, Kept]) -> str | None:
        """Why the model built with `change` is not that of the cut; None when it is."""
        try:
            built = build_from(self.owner, change)
        except (
            Exception
        ) as error:  # whatever a library's constructor raises for settings that do not go together
            return str(error)
        wanted = {
            new: shape
            for name, shape in self.shapes.items()
            if (new := _renamed(name, kept)) is not None
        }
        if (reason := difference(plain_shapes(built), wanted)) is not None:
            return reason
        return self._compare_attributes(_attributes(built), kept, change)

    def _compare_attributes(
        self, built: dict[str, dict[str, Any]], kept: Mapping[str, Kept], change: Mapping
    ) -> str | None:
        """Plain attributes of the kept blocks must stay what they are, but for the index of the block."""
        found = []
        for name, old in self.plain.items():
            new_name = _renamed(name, kept)
            if new_name is None or new_name not in built:
                continue
            indices = _indices(name, new_name)
            for key, value in old.items():
                new = built[new_name].get(key, value)
                if new == value and type(new) is type(value):
                    continue
                in_block = any(
                    name.startswith(
                        f"{split_path(path)[0]}.".lstrip(".") + split_path(path)[1] + "."
                    )
                    for path in kept
                )
                if (
                    in_block
                    and "drop" not in f"{name}.{key}".lower()
                    and (value, new) not in indices
                ):
                    return f"{name}.{key} is {value!r}, and {new!r} by that config"
                found.append((name, key, new))
        self.attributes = found
        return None


def _indices(old: str, new: str) -> list[tuple[int, int]]:
    return [
        (int(a), int(b))
        for a, b in zip(old.split("."), new.split("."))
        if a.isdigit() and b.isdigit()
    ]


def _renamed(name: str, kept: Mapping[str, Kept]) -> str | None:
    """The name of a parameter or module after the cut; None for what the cut takes."""
    for path, blocks in kept.items():
        owner, joined = split_path(path)
        start = 0
        for part in joined.split("+"):
            prefix = f"{owner}.{part}." if owner else f"{part}."
            if name.startswith(prefix):
                index, _, rest = name.removeprefix(prefix).partition(".")
                if index.isdigit():
                    new = blocks.new_index(int(index) + start)
                    return None if new is None else f"{prefix}{new}{'.' if rest else ''}{rest}"
        # a stack of several joined lists is one of this project's models, which state their depth
        # themselves
    return name


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            k: v
            for k, v in vars(module).items()
            if not k.startswith("_") and k != "training" and _is_plain(v)
        }
        for name, module in model.named_modules()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
