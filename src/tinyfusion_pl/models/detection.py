"""What a state dict reveals about its model: family, sizes, depth of each stack."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion_pl.models.family import Family
from tinyfusion_pl.models.label_tables import label_arguments
from tinyfusion_pl.models.prefixes import NUM_NAMED, plain_names, prefixes_with, under_prefix
from tinyfusion_pl.models.registry import list_families, model_arguments, model_class
from tinyfusion_pl.models.state_shapes import count_blocks

GIVE_NAME = (
    "Give the model: load_pretrained(path, name='dit_xl_2'), or model.name=dit_xl_2 on the command "
    "line; list_models() lists all names."
)


def get_signs() -> dict[str, tuple[str, ...]]:
    """Layout -> keys that only it has; families that share a layout are joined by "or"."""
    names: dict[tuple[str, ...], list[str]] = {}
    for family in list_families():
        if family.signs:
            names.setdefault(family.signs, []).append(family.name)
    signs = {" or ".join(each): keys for keys, each in names.items()}
    for family in list_families():
        if family.diffusers is not None:
            signs[f"diffusers' {family.name}"] = family.diffusers.signs
    return signs


def detect_family(keys: Iterable[str]) -> str | None:
    """A key of `get_signs`, or None."""
    keys = set(keys)
    return next((name for name, signs in get_signs().items() if keys.issuperset(signs)), None)


def plain_state(
    state: Mapping[str, Tensor], where: str | Path, *, name: str | None = None
) -> dict[str, Tensor]:
    """`state` without a prefix before the keys of its family or before the stacks of model `name`.

    Raises:
        ValueError: Two prefixes are possible.
    """
    plain = plain_names(state)
    for signs in get_signs().values():
        if prefixes_with(plain, signs):
            return _without_prefix(state, plain, signs, where)
    parts = (
        [part for path in getattr(model_class(name), "STACKS", {}) for part in path.split("+")]
        if name is not None
        else []
    )
    for part in parts:
        firsts = {
            found[1]
            for key in plain
            if (found := re.search(rf"(?:^|\.)({re.escape(part)}\.0\..+)", key))
        }
        if firsts:
            return _without_prefix(state, plain, [min(firsts)], where)
    return dict(state)


def _without_prefix(
    state: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    signs: Collection[str],
    where: str | Path,
) -> dict[str, Tensor]:
    if prefixes_with(plain, signs) == [""] and plain.keys() == state.keys():
        return dict(state)
    return under_prefix(state, signs, where)


def get_depths(
    state: Collection[str], name: str, where: str | Path = "The state dict"
) -> dict[str, int]:
    """Depth of each stack of model `name` in a state dict: constructor argument -> blocks.

    Raises:
        ArtifactError: Blocks are not numbered 0, 1, 2, ...
    """
    stacks = getattr(model_class(name), "STACKS", {})
    shared = {argument for argument, times in Counter(stacks.values()).items() if times > 1}
    depths = {}
    for path, argument in stacks.items():
        # "in_blocks+out_blocks" is one stack of two lists
        num_blocks = sum(count_blocks(state, part, where) for part in path.split("+"))
        if num_blocks and argument not in shared:
            depths[argument] = num_blocks
    return depths


def get_arguments(
    state: Mapping[str, Tensor], name: str, path: str | Path, *, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of model `name` that a state dict shows: depths and classes.

    Raises:
        ArtifactError: Blocks are not numbered 0, 1, 2, ...
    """
    return {**get_depths(state, name, path), **_labels(state, name, path, given, named=True)}


def _labels(
    state: Mapping[str, Tensor],
    name: str,
    path: str | Path,
    given: Mapping[str, Any],
    *,
    named: bool,
) -> dict[str, Any]:
    taken = model_arguments(name)
    if not {"num_classes", "class_dropout_prob"} <= taken.keys():
        return {}
    tables = [table for family in list_families() for table in family.label_tables]
    return label_arguments(
        state,
        {"num_classes": taken["num_classes"].default, **given},
        path,
        tables=tables,
        named=named,
    )


def name_and_sizes(
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    name: str | None = None,
    given: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Registered name and arguments of the model that a state dict belongs to.

    Args:
        state: State dict in the published layout.
        path: Origin of `state`, for errors.
        name: Registered name, where the file states it and only sizes are missing.
        given: Arguments that the caller states, such as ``num_heads`` where the shapes do not show
            it, or ``num_classes`` where the label table has no null row.

    Raises:
        ValueError: The model is not recognized; the message states what to give.
        ArtifactError: Keys that sizes are read from are missing or have an impossible shape.
    """
    family = _find_family(state)
    if family is not None and family.read_sizes is not None:
        name, sizes = family.read_sizes(state, path, name=name, given=given)
        labels = _labels(state, name, path, given, named=False)
        return name, {**get_depths(state, name, path), **sizes, **labels}
    if name is None:
        raise ValueError(f"Cannot recognize the model of {path}{_hint(state)}. {GIVE_NAME}")
    return name, get_arguments(state, name, path, given=given)


def _find_family(keys: Collection[str]) -> Family | None:
    """The first family whose signs `keys` has; DiT for what may also be a SiT."""
    keys = set(keys)
    return next((each for each in list_families() if each.signs and keys >= set(each.signs)), None)


def _hint(state: Mapping[str, Tensor]) -> str:
    """What the keys share with those of a known layout."""
    if (found := detect_family(state)) is not None:
        return f": it has the keys of {found}"
    for name, signs in get_signs().items():
        if has := [sign for sign in signs if sign in state]:
            missing = ", ".join(sign for sign in signs if sign not in state)
            return f": it has the {has[0]} of {name}, but lacks {missing}"
    return f"; it has {', '.join(list(state)[:NUM_NAMED])}"
