"""Which sets of weights a checkpoint holds, and which of them is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.shadow_params import name_shadow_params
from tinyfusion_pl.models.weight_names import (
    EMA,
    RAW,
    UNSTATED,
    are_alike,
    core_names,
    get_kind,
    is_fixed,
)
from tinyfusion_pl.models.weight_search import NUM_NAMED, TooManyEntries, WeightSet, find_sets

WEIGHTS = (EMA, RAW)


def choose(content: Any, weights: str, path: Path, *, prefix: str = "") -> WeightSet:
    """The set of weights in `content`, what `path` holds, that `weights` asks for: averaged, raw, or an entry by its name.

    Args:
        prefix: Names are wanted that start with it: a state dict that has such is not taken apart.

    Raises:
        ValueError: for a `weights` that is none of these, or when it cannot be told which set is
            meant; names the sets.
        ArtifactError: when there is none.
    """
    try:
        sets = list(find_sets(content, prefix=prefix))
    except TooManyEntries as error:
        raise ArtifactError(f"{path} {error}.") from error
    sets = [each for each in sets if not _is_statistics(each, sets)]
    named = [each for each in sets if isinstance(each.state, dict)]
    if not sets:
        held = list(content)[:NUM_NAMED] if isinstance(content, Mapping) else type(content).__name__
        raise ArtifactError(
            f"{path} holds no state dict: a mapping from names to tensors, bare or under 'ema', 'model_ema', 'model' or "
            f"'state_dict', was expected; found {held}."
        )
    if weights not in WEIGHTS:
        chosen = [each for each in sets if each.path and each.name == weights]
        if not chosen:
            raise ValueError(f"weights is {weights!r}; give 'ema' or 'raw'{_or_names(sets)}.")
        return _with_names(chosen[0], named, path)
    return _with_names(_of_kind(sets, weights, path, _not_read(content, sets)), named, path)


def _or_names(sets: Sequence[WeightSet]) -> str:
    names = [repr(each.name) for each in sets if each.path]
    return (
        f", or the entry of the file that is meant: {', '.join(names[:NUM_NAMED])}" if names else ""
    )


def _of_kind(sets: list[WeightSet], weights: str, path: Path, ignored: str) -> WeightSet:
    of = {kind: [each for each in sets if each.kind == kind] for kind in (EMA, RAW, UNSTATED)}
    if wanted := of[weights]:
        return _the_one(wanted, weights, path)
    other = RAW if weights == EMA else EMA
    if found := of[other]:
        chosen = _the_one(found, weights, path)
        alike = [each for each in of[UNSTATED] if _same_model(each, chosen)]
        if alike:
            what = {EMA: "the averaged", RAW: "the raw"}
            raise ValueError(
                f"{path} holds {what[other]} weights under {chosen.name!r}, and under "
                f"{', '.join(repr(e.name) for e in alike)} "
                f"others of the same keys. If these are {what[weights]} ones, give weights={alike[0].name!r} (model.weights); "
                f"weights={other!r} takes {chosen.name!r}."
            )
        kinds = {EMA: "averaged", RAW: "raw"}
        warn(
            f"{path} holds {kinds[other]} weights only (under {chosen.name!r}): they are taken and recorded as weights={other!r}, "
            f"although weights={weights!r} was asked for.{ignored}"
        )
        return chosen
    chosen = _the_one(of[UNSTATED], weights, path)
    if chosen.path:
        warn(
            f"{path} holds weights under {chosen.name!r}, which does not say whether they are averaged: they are taken, and recorded "
            f"as {UNSTATED}."
        )
    return chosen


def _not_read(content: Any, sets: list[WeightSet]) -> str:
    """A sentence on entries that are called averages and hold tensors, of which no set of weights was made."""
    if not isinstance(content, Mapping):
        return ""
    read = {each.path[0] for each in sets if each.path}
    sizes = {
        str(key): value.numel() if isinstance(value, Tensor) else len(value)
        for key, value in content.items()
        if isinstance(value, (Tensor, Mapping, list, tuple))
    }
    names = [
        name
        for name, size in sizes.items()
        if size > 1 and get_kind([name]) == EMA and name not in read
    ]
    return (
        f" What is under {', '.join(map(repr, names[:NUM_NAMED]))} is no state dict, and was not read."
        if names
        else ""
    )


def _the_one(sets: list[WeightSet], weights: str, path: Path) -> WeightSet:
    first = sets[0]
    if all(_equal(first, each) for each in sets[1:]):
        return first
    names = ", ".join(repr(each.name) for each in sets)
    raise ValueError(
        f"{path} holds {len(sets)} sets of weights that may be meant by weights={weights!r}: under {names}. Give the one that "
        f"is meant, e.g. weights={sets[-1].name!r} (model.weights)."
    )


def _equal(one: WeightSet, other: WeightSet) -> bool:
    if isinstance(one.state, list) or isinstance(other.state, list):
        return False
    first, second = core_names(one.state), core_names(other.state)
    return first.keys() == second.keys() and all(
        _same(one.state[key], other.state[second[name]]) for name, key in first.items()
    )


def _same(one: Tensor, other: Tensor) -> bool:
    plain = all(
        each.layout == torch.strided and not (each.is_meta or each.is_quantized or each.is_nested)
        for each in (one, other)
    )
    return one is other or (
        plain and one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    )


def _is_statistics(one: WeightSet, sets: Sequence[WeightSet]) -> bool:
    """Whether an average is of something smaller than the model beside it: of a loss, of norms, the decay itself."""

    def is_far_larger(other: WeightSet) -> bool:
        return (
            isinstance(other.state, dict)
            and len(other.state) > 2 * len(one.state)
            and not core_names(one.state).keys() & core_names(other.state).keys()
        )

    return one.kind == EMA and isinstance(one.state, dict) and any(map(is_far_larger, sets))


def _same_model(one: WeightSet, other: WeightSet) -> bool:
    if isinstance(one.state, list) or isinstance(other.state, list):
        return len(one.state) == len(other.state)
    return are_alike(one.state, other.state)


def _with_names(chosen: WeightSet, named: list[WeightSet], path: Path) -> WeightSet:
    """`chosen`, its tensors named after another set where it is a list of them in the order of the parameters."""
    if isinstance(chosen.state, dict):
        return _completed(chosen, named, path) if chosen.kind == EMA else chosen
    for other in sorted(named, key=lambda each: each.kind != RAW):
        if (state := name_shadow_params(chosen.state, other.state)) is not None:
            left = [key for key in other.state if state[key] is other.state[key]]
            if learned := [key for key in left if not is_fixed(key, other.state[key])]:
                raise ValueError(
                    f"{path} holds under {chosen.name!r} {len(chosen.state)} tensors without names, which go with those of "
                    f"{other.name!r} but for {', '.join(learned[:NUM_NAMED])}{', ...' if len(learned) > NUM_NAMED else ''}: "
                    "these were frozen, or are lost. Save the averaged weights with their names."
                )
            if left:
                warn(
                    f"{path}: {chosen.name!r} has no {', '.join(left[:NUM_NAMED])}; taken from {other.name!r}."
                )
            return replace(chosen, state=state)
    raise ValueError(
        f"{path} holds under {chosen.name!r} {len(chosen.state)} tensors without names, and no state dict that they go with "
        f"one by one. Save them with their names, or give {_or_names(named).removeprefix(', or ') or 'another file'}."
    )


def _completed(chosen: WeightSet, named: list[WeightSet], path: Path) -> WeightSet:
    """`chosen` with the tensors that averages of parameters lack, buffers and fixed tables, from another set of the same model."""
    own = core_names(chosen.state)
    for other in named:
        names = core_names(other.state)
        lacking = [name for name in names if name not in own]
        if (
            other is chosen
            or not own.keys() < names.keys()
            or not all(is_fixed(name, other.state[names[name]]) for name in lacking)
        ):
            continue
        name, key = next(iter(own.items()))
        prefix = key.removesuffix(name) if key.endswith(name) else ""
        warn(
            f"{path}: {chosen.name!r} has no {', '.join(lacking[:NUM_NAMED])}; taken from {other.name!r}."
        )
        return replace(
            chosen,
            state={**chosen.state, **{prefix + name: other.state[names[name]] for name in lacking}},
        )
    return chosen
