"""Finding the sets of weights in what a checkpoint holds: plain containers and tensors, nested as training codes nest them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinyfusion_pl.models.weight_names import EMA, RAW, UNSTATED, are_alike, get_kind, is_no_model

NUM_NAMED = 5
MAX_DEPTH, MAX_ENTRIES = 5, 100_000  # of entries inside entries
LIGHTNING = (
    "state_dict",
    "current_model_state",
)  # where its weight averaging keeps averaged and raw weights


@dataclass(frozen=True)
class WeightSet:
    """One set of weights: the entries that lead to it in its file, what they say of it, and its tensors by name, or in order."""

    path: tuple[str, ...]
    kind: str
    state: dict[str, Tensor] | list[Tensor]

    @property
    def name(self) -> str:
        return ".".join(self.path) or "the file itself"


class TooManyEntries(ValueError):
    """Entries inside entries without end."""


def find_sets(content: Any, *, prefix: str = "") -> Iterator[WeightSet]:
    """Every set of weights inside `content`, which is plain containers and tensors."""
    top = content if isinstance(content, Mapping) else {}
    averaged = all(isinstance(top.get(key), Mapping) for key in LIGHTNING)
    for path, state in _walk(content, (), (), [0]):
        kind = EMA if averaged and path == LIGHTNING[:1] else get_kind(path)
        if prefix and isinstance(state, dict) and any(key.startswith(prefix) for key in state):
            alone = all(key.startswith(prefix) for key in state)
            kind = kind if kind == EMA else get_kind([*(path if alone else ()), *prefix.split(".")])
            yield WeightSet(path, kind, state)
        else:
            yield from _branches(WeightSet(path, kind, state))


def _walk(
    value: Any,
    path: tuple[str, ...],
    around: tuple[int, ...],
    num: list[int],
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor] | list[Tensor]]]:
    """State dicts and lists of tensors inside `value`; `around` are the containers that it is in, `num` counts those in them."""
    if (
        id(value) in around
        or len(path) > MAX_DEPTH
        or not isinstance(value, (Mapping, list, tuple))
    ):
        return
    around = (*around, id(value))
    held = value.values() if isinstance(value, Mapping) else value[:NUM_NAMED]
    num[0] += sum(isinstance(each, (Mapping, list, tuple)) for each in held)
    if num[0] > MAX_ENTRIES:
        raise TooManyEntries(
            f"holds more than {MAX_ENTRIES} entries inside entries, where a state dict was expected"
        )
    if isinstance(value, Mapping):
        if (
            value
            and all(isinstance(each, Tensor) for each in value.values())
            and _are_places(value)
        ):
            yield from _walk([value[key] for key in sorted(value, key=int)], path, around, num)
            return
        tensors = {
            key: each
            for key, each in value.items()
            if isinstance(key, str) and isinstance(each, Tensor)
        }
        inner = {
            str(key): each
            for key, each in value.items()
            if isinstance(each, (Mapping, list, tuple))
        }
        named = all(isinstance(key, str) for key in value)
        if (
            named
            and any(each.ndim for each in tensors.values())
            and (not inner or any("." in key for key in tensors))
        ):
            yield path, tensors
        for key, each in inner.items():
            if not is_no_model(key):
                yield from _walk(each, (*path, key), around, num)
    elif value and all(isinstance(each, Tensor) for each in value):
        if len(value) > 1 or get_kind(path) == EMA:
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
    if "n_averaged" in state and all(
        key.startswith("module.") for key in state if key != "n_averaged"
    ):  # torch's AveragedModel
        inner = {
            key.removeprefix("module."): value
            for key, value in state.items()
            if key != "n_averaged"
        }
        yield WeightSet(whole.path, EMA, inner)
        return
    for prefix in _averaged_prefixes(state):
        inside = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix) and value.ndim
        }
        rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
        if not any(value.ndim for value in rest.values()):
            names = {
                key: value for key, value in state.items() if key.startswith(prefix) and value.ndim
            }
            yield WeightSet(
                (*whole.path, prefix[:-1]), EMA, names
            )  # the prefix is taken off, and said, as any other
            return
        if (inside := _as_named_in(rest, inside)) is not None:
            kind = RAW if whole.kind == UNSTATED else get_kind([*whole.path, *_first_parts(rest)])
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
        for depth in range(1, MAX_DEPTH):
            if len(parts) > depth and get_kind(parts[depth - 1 : depth]) == EMA:
                found[".".join(parts[:depth]) + "."] = None
                break
    return list(found)[:NUM_NAMED]


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


def _are_places(keys: Iterable[Any]) -> bool:
    """Whether keys are 0, 1, 2, ..., as numbers or as text."""
    found = [str(key) for key in keys]
    return all(key.isascii() and key.isdecimal() and len(key) < 10 for key in found) and sorted(
        map(int, found)
    ) == list(range(len(found)))
