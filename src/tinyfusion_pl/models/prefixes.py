"""Prefixes that training code and wrappers add to weight names, removed where unambiguous."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from tinyfusion_pl.models.notices import warn
from tinyfusion_pl.models.weight_names import without_wrappers

NUM_NAMED = 5


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without wrappers' parts of names (``_orig_mod.``), unless names would collide."""
    plain = {without_wrappers(key): value for key, value in state.items()}
    return plain if len(plain) == len(state) else dict(state)


def prefixes_with(keys: Collection[str], expected: Iterable[str]) -> list[str]:
    """All prefixes, including "", under which every name in `expected` exists."""
    expected = list(expected)
    if not expected:
        return []
    keys, first = set(keys), max(expected, key=len)
    candidates = [key[: -len(first)] for key in keys if key == first or key.endswith(f".{first}")]
    return sorted(
        prefix for prefix in candidates if all(prefix + name in keys for name in expected)
    )


def under_prefix(
    state: Mapping[str, Tensor], expected: Iterable[str], where: str | Path
) -> dict[str, Tensor]:
    """The part of `state` with the names `expected`, without their prefix; else `state`.

    Warns about a removed prefix and ignored keys.

    Raises:
        ValueError: Two prefixes are possible.
    """
    plain = plain_names(state)
    found = prefixes_with(plain, expected)
    if len(found) > 1:
        named = " and ".join(repr(prefix) if prefix else "no prefix" for prefix in found)
        raise ValueError(
            f"{where} holds weights that fit under each of {named}. Select one: "
            f"prefix={found[-1]!r} (model.prefix)."
        )
    if not found or (not found[0] and plain.keys() == state.keys()):
        return dict(state)
    prefix = found[0]
    rest = [key for key in plain if not key.startswith(prefix) and plain[key].ndim]
    left = (
        f" {len(rest)} other keys are left out: {', '.join(rest[:NUM_NAMED])}"
        f"{', ...' if len(rest) > NUM_NAMED else ''}."
        if rest
        else ""
    )
    said = "parts that wrappers put into names were taken off"
    if prefix:
        said = f"the prefix {prefix!r} was taken off the names of its weights"
    warn(f"{where}: {said}.{left}")
    return {
        key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)
    }


def nearest_prefix(keys: Collection[str], expected: Collection[str]) -> str:
    """The prefix under which most names in `expected` exist, for error messages."""
    counts: dict[str, int] = {}
    expected = set(expected)
    for key in keys:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in expected:
                prefix = ".".join([*parts[:i], ""])
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")
