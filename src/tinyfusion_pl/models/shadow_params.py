"""Averaged weights stored as a list in parameter order, as torch_ema and diffusers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

MAX_PRODUCT = 10_000_000  # of the two lengths


def name_shadow_params(
    values: Sequence[Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The list `values` under the names of `state`, which has the same order.

    Tensors that the list lacks (buffers, frozen parameters) are taken from `state`.

    Returns:
        None if the shapes do not fit, or fit in several ways.
    """
    keys = list(state)
    shapes, own = (
        [tuple(state[key].shape) for key in keys],
        [tuple(value.shape) for value in values],
    )
    if len(own) > len(keys) or len(own) * len(keys) > MAX_PRODUCT:
        return None
    if len(own) == len(keys):
        return dict(zip(keys, values)) if own == shapes else None
    spare = len(keys) - len(own)
    # ways[i][s]: number of ways (2: several) in which values[i:] fit keys[i + s:]
    ways = [[0] * (spare + 1) for _ in range(len(own))] + [[1] * (spare + 1)]
    for i in reversed(range(len(own))):
        for s in reversed(range(spare + 1)):
            taken = ways[i + 1][s] if own[i] == shapes[i + s] else 0
            skipped = ways[i][s + 1] if s < spare else 0
            ways[i][s] = min(2, taken + skipped)
    if ways[0][0] != 1:
        return None
    named, i = {}, 0
    for place, key in enumerate(keys):
        s = place - i
        takes = i < len(own) and own[i] == shapes[place] and ways[i + 1][s]
        named[key] = values[i] if takes else state[key]
        i += bool(takes)
    return named
