"""Which sets of weights a checkpoint holds, and which of them is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.shadow_params import name_shadow_params
from tinyfusion_pl.models.weight_names import EMA, RAW, UNSTATED, are_alike, core_names, is_fixed, is_no_model, kind_of

WEIGHTS = (EMA, RAW)
NUM_NAMED = 5
MAX_DEPTH, MAX_ENTRIES = 5, 100_000  # of entries inside entries
LIGHTNING = ("state_dict", "current_model_state")  # where its weight averaging keeps averaged and raw weights


@dataclass(frozen=True)
class WeightSet:
    """One set of weights: the entries that lead to it in its file, what they say of it, and its tensors by name, or in order."""

    path: tuple[str, ...]
    kind: str
    state: dict[str, Tensor] | list[Tensor]

    @property
    def name(self) -> str:
        return ".".join(self.path) or "the file itself"


class _TooManyEntries(ValueError):
    """Entries inside entries without end."""


def choose(content: Any, weights: str, path: Path, *, prefix: str = "") -> WeightSet:
    """The set of weights in `content`, what `path` holds, that `weights` asks for: averaged, raw, or an entry by its name.

    Args:
        prefix: Names are wanted that start with it: a state dict that has such is not taken apart.

    Raises:
        ValueError: for a `weights` that is none of these, or when it cannot be told which set is meant; names the sets.
        ArtifactError: when there is none.
    """
    try:
        sets = list(find_sets(content, prefix=prefix))
    except _TooManyEntries as error:
        raise ArtifactError(f"{path} {error}.") from error
    named = [each for each in sets if isinstance(each.state, dict)]
    if not sets:
        held = list(content)[:NUM_NAMED] if isinstance(content, Mapping) else type(content).__name__
        raise ArtifactError(f"{path} holds no state dict: a mapping from names to tensors, bare or under 'ema', 'model_ema', 'model' or "
                            f"'state_dict', was expected; found {held}.")
    if weights not in WEIGHTS:
        chosen = [each for each in sets if each.path and each.name == weights]
        if not chosen:
            raise ValueError(f"weights is {weights!r}; give 'ema' or 'raw'{_or_names(sets)}.")
        return _with_names(chosen[0], named, path)
    return _with_names(_of_kind(sets, weights, path), named, path)


def _or_names(sets: Sequence[WeightSet]) -> str:
    names = [repr(each.name) for each in sets if each.path]
    return f", or the entry of the file that is meant: {', '.join(names[:NUM_NAMED])}" if names else ""


def _of_kind(sets: list[WeightSet], weights: str, path: Path) -> WeightSet:
    of = {kind: [each for each in sets if each.kind == kind] for kind in (EMA, RAW, UNSTATED)}
    if wanted := of[weights]:
        return _the_one(wanted, weights, path)
    other = RAW if weights == EMA else EMA
    if found := of[other]:
        chosen = _the_one(found, weights, path)
        alike = [each for each in of[UNSTATED] if _same_model(each, chosen)]
        if alike:
            what = {EMA: "the averaged", RAW: "the raw"}
            raise ValueError(f"{path} holds {what[other]} weights under {chosen.name!r}, and under "
                             f"{', '.join(repr(e.name) for e in alike)} "
                             f"others of the same keys. If these are {what[weights]} ones, give weights={alike[0].name!r} (model.weights); "
                             f"weights={other!r} takes {chosen.name!r}.")
        kinds = {EMA: "averaged", RAW: "raw"}
        warn(f"{path} holds {kinds[other]} weights only (under {chosen.name!r}): they are taken and recorded as "
             f"weights={other!r}, although "
             f"weights={weights!r} was asked for.")
        return chosen
    chosen = _the_one(of[UNSTATED], weights, path)
    if chosen.path:
        warn(f"{path} holds weights under {chosen.name!r}, which does not say whether they are averaged: they are taken, and recorded "
             f"as {UNSTATED}.")
    return chosen


def _the_one(sets: list[WeightSet], weights: str, path: Path) -> WeightSet:
    first = sets[0]
    if all(_equal(first, each) for each in sets[1:]):
        return first
    names = ", ".join(repr(each.name) for each in sets)
    raise ValueError(f"{path} holds {len(sets)} sets of weights that may be meant by weights={weights!r}: under {names}. Give the one that "
                     f"is meant, e.g. weights={sets[-1].name!r} (model.weights).")


def _equal(one: WeightSet, other: WeightSet) -> bool:
    if isinstance(one.state, list) or isinstance(other.state, list):
        return False
    first, second = core_names(one.state), core_names(other.state)
    return first.keys() == second.keys() and all(_same(one.state[key], other.state[second[name]]) for name, key in first.items())


def _same(one: Tensor, other: Tensor) -> bool:
    plain = all(each.layout == torch.strided and not (each.is_meta or each.is_quantized or each.is_nested) for each in (one, other))
    return one is other or (plain and one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))


def _same_model(one: WeightSet, other: WeightSet) -> bool:
    if isinstance(one.state, list) or isinstance(other.state, list):
        return len(one.state) == len(other.state)
    return are_alike(one.state, other.state)


def _with_names(chosen: WeightSet, named: list[WeightSet], path: Path) -> WeightSet:
    """`chosen`, its tensors named after another set where it is a list of them in the order of the parameters."""
    if isinstance(chosen.state, dict):
        return chosen
    for other in sorted(named, key=lambda each: each.kind != RAW):
        if (state := name_shadow_params(chosen.state, other.state)) is not None:
            left = [key for key in other.state if state[key] is other.state[key]]
            if learned := [key for key in left if not is_fixed(key, other.state[key])]:
                raise ValueError(f"{path} holds under {chosen.name!r} {len(chosen.state)} tensors without names, which go with those of "
                                 f"{other.name!r} but for {', '.join(learned[:NUM_NAMED])}{', ...' if len(learned) > NUM_NAMED else ''}: "
                                 "these were frozen, or are lost. Save the averaged weights with their names.")
            if left:
                warn(f"{path}: {chosen.name!r} has no {', '.join(left[:NUM_NAMED])}; taken from {other.name!r}.")
            return replace(chosen, state=state)
    raise ValueError(f"{path} holds under {chosen.name!r} {len(chosen.state)} tensors without names, and no state dict that they go with "
                     f"one by one. Save them with their names, or give {_or_names(named).removeprefix(', or ') or 'another file'}.")


# -- finding them
def find_sets(content: Any, *, prefix: str = "") -> Iterator[WeightSet]:
    """Every set of weights inside `content`, which is plain containers and tensors."""
    top = content if isinstance(content, Mapping) else {}
    averaged = all(isinstance(top.get(key), Mapping) for key in LIGHTNING)
    for path, state in _walk(content, (), (), [0]):
        kind = EMA if averaged and path == LIGHTNING[:1] else kind_of(path)
        if prefix and isinstance(state, dict) and any(key.startswith(prefix) for key in state):
            kind = kind if kind == EMA else kind_of([*path, *prefix.split(".")])
            yield WeightSet(path, kind, state)
        else:
            yield from _branches(WeightSet(path, kind, state))


def _walk(value: Any, path: tuple[str, ...], around: tuple[int, ...], num: list[int],
          ) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor] | list[Tensor]]]:
    """State dicts and lists of tensors inside `value`; `around` are the containers that it is in, `num` counts those in them."""
    if id(value) in around or len(path) > MAX_DEPTH or not isinstance(value, (Mapping, list, tuple)):
        return
    around = (*around, id(value))
    num[0] += sum(isinstance(each, (Mapping, list, tuple)) for each in (value.values() if isinstance(value, Mapping) else value[:NUM_NAMED]))
    if num[0] > MAX_ENTRIES:
        raise _TooManyEntries(f"holds more than {MAX_ENTRIES} entries inside entries, where a state dict was expected")
    if isinstance(value, Mapping):
        tensors = {key: each for key, each in value.items() if isinstance(key, str) and isinstance(each, Tensor)}
        inner = {key: each for key, each in value.items() if isinstance(key, str) and isinstance(each, (Mapping, list, tuple))}
        named = all(isinstance(key, str) for key in value)
        if named and any(each.ndim for each in tensors.values()) and (not inner or any("." in key for key in tensors)):
            yield path, tensors
        for key, each in inner.items():
            if not is_no_model(key):
                yield from _walk(each, (*path, key), around, num)
    elif value and all(isinstance(each, Tensor) for each in value):
        if len(value) > 1 or kind_of(path) == EMA:
            yield path, list(value)
    else:
        for number, each in enumerate(value[:NUM_NAMED]):
            yield from _walk(each, (*path, str(number)), around, num)


def _branches(whole: WeightSet) -> Iterator[WeightSet]:
    """The averaged and the raw half of a state dict that has both under prefixes; else `whole` itself."""
    state = whole.state
    if isinstance(state, list):
        yield whole
        return
    if "n_averaged" in state and all(key.startswith("module.") for key in state if key != "n_averaged"):  # torch's AveragedModel
        inner = {key.removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}
        yield WeightSet(whole.path, EMA, inner)
        return
    for prefix in _averaged_prefixes(state):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix) and value.ndim}
        rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
        if not any(value.ndim for value in rest.values()):
            names = {key: value for key, value in state.items() if key.startswith(prefix) and value.ndim}
            yield WeightSet((*whole.path, prefix[:-1]), EMA, names)  # the prefix is taken off, and said, as any other
            return
        if (inside := _as_named_in(rest, inside)) is not None:
            kind = RAW if whole.kind == UNSTATED else kind_of([*whole.path, *_first_parts(rest)])
            yield WeightSet((*whole.path, prefix[:-1]), EMA, inside)
            weights = {key: value for key, value in rest.items() if value.ndim or "." in key}
            yield WeightSet((*whole.path, *_first_parts(rest)), kind, weights)
            return
    yield whole


def _first_parts(rest: Mapping[str, Tensor]) -> tuple[str, ...]:
    firsts = {key.partition(".")[0] for key, value in rest.items() if value.ndim}
    return tuple(firsts) if len(firsts) == 1 else ()


def _averaged_prefixes(state: Mapping[str, Tensor]) -> list[str]:
    found = {}
    for key in state:
        parts = key.split(".")
        for depth in (1, 2):
            if len(parts) > depth and kind_of(parts[depth - 1:depth]) == EMA:
                found[".".join(parts[:depth]) + "."] = None
                break
    return list(found)


def _as_named_in(rest: Mapping[str, Tensor], inside: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """`inside` if it has the keys of `rest`, or of a part of it (latent diffusion names averages without dots). None: another model."""
    for first in ("", *dict.fromkeys(f"{key.partition('.')[0]}." for key in rest)):
        part = [key.removeprefix(first) for key in rest if key.startswith(first)]
        if are_alike(inside, part):
            return inside
        flat = {key.replace(".", ""): key for key in part}
        if inside and inside.keys() <= flat.keys():
            return {flat[key]: value for key, value in inside.items()}
    return None
