"""The structures of a space: counted, listed, drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tinyfusion_pl.pruning.subsets import SubsetDistribution
from tinyfusion_pl.selection.space import Space

MAX_TRIES = 1000


def num_structures(space: Space) -> int:
    """Number of structures that `space` allows.

    With several stacks under one budget, includes those that would empty a stack.
    """
    return math.prod(
        math.comb(len(space.free(part)), space.num_free_kept(part)) for part in space.parts
    )


def all_structures(space: Space) -> Tensor:
    """All of them: (S, num_units) bool."""
    choices = [
        itertools.combinations(space.free(part), space.num_free_kept(part)) for part in space.parts
    ]
    rows = [[unit for members in each for unit in members] for each in itertools.product(*choices)]
    structures = torch.zeros(len(rows), space.num_units, dtype=torch.bool)
    structures[:, list(space.fixed)] = True
    for structure, kept in zip(structures, rows):
        structure[kept] = True
    return structures[[space.is_valid(structure) for structure in structures]]


def distributions(space: Space, theta: Tensor) -> list[SubsetDistribution]:
    """The distribution over the free units of each part at `theta` (num_units,)."""
    return [
        SubsetDistribution(theta[space.free(part)], space.num_free_kept(part))
        for part in space.parts
    ]


def sample_structures(
    space: Space, theta: Tensor, num_samples: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Independent draws (num_samples, num_units) bool."""
    each, found = distributions(space, theta), torch.empty(0, space.num_units, dtype=torch.bool)
    for _ in range(MAX_TRIES):  # those that would empty a stack are drawn again
        structures = _assembled(
            space, [d.sample(num_samples - len(found), generator=generator) for d in each]
        )
        found = torch.cat(
            [found, structures[[space.is_valid(structure) for structure in structures]]]
        )
        if len(found) == num_samples:
            return found
    raise ValueError(
        f"Nearly every structure would empty one of the stacks {', '.join(space.paths)}. "
        "Keep more units, or give a budget for each stack: keep={PATH: COUNT}."
    )


def most_probable_structures(space: Space, theta: Tensor, count: int) -> Tensor:
    """The `count` most probable structures at `theta`, best first."""
    ranked = [
        d.most_probable(count if len(space.paths) == 1 else 4 * count)
        for d in distributions(space, theta)
    ]
    values = [subsets.double() @ d.theta for d, subsets in zip(distributions(space, theta), ranked)]
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for value in values:  # of the parts so far, as many as could still be among the best
        best = [
            (total + float(v), (*places, i)) for total, places in best for i, v in enumerate(value)
        ]
        best = sorted(best, key=lambda each: -each[0])[: 4 * count]
    rows = [[subsets[i] for subsets, i in zip(ranked, places)] for _, places in best]
    structures = _assembled(space, [torch.stack(column) for column in zip(*rows)])
    return structures[[space.is_valid(structure) for structure in structures]][:count]


def get_candidates(space: Space, limit: int, generator: torch.Generator) -> Tensor:
    """All structures if at most `limit`, else the distinct ones of `limit` draws.

    (S, num_units) bool.
    """
    if num_structures(space) <= limit:
        return all_structures(space)
    return distinct(
        sample_structures(space, torch.zeros(space.num_units), limit, generator=generator)
    )


def distinct(structures: Sequence[Tensor] | Tensor) -> Tensor:
    """`structures` without repetitions, in the order of their first."""
    found = {tuple(structure.tolist()): structure for structure in structures}
    return torch.stack(list(found.values()))


def _assembled(space: Space, drawn: Sequence[Tensor]) -> Tensor:
    structures = torch.zeros(len(drawn[0]), space.num_units, dtype=torch.bool)
    structures[:, list(space.fixed)] = True
    for part, subsets in zip(space.parts, drawn):
        structures[:, space.free(part)] = subsets
    return structures
