"""Rules that look at no data: by place alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tinyfusion_pl.pruning.blocks import by_path
from tinyfusion_pl.selection.candidates import sample_structures
from tinyfusion_pl.selection.problem import CANDIDATES, Choice, Problem
from tinyfusion_pl.selection.space import Part, Space


class _ByPlace:
    """Keeps some of the free units of each part by their place."""

    name: ClassVar[str]

    def __call__(self, problem: Problem) -> Choice:
        return Choice(self.check(problem.space))

    def check(self, space: Space) -> Tensor:
        """The structure; `ValueError` where the rule has none for the budget."""
        kept = [unit for part in space.parts for unit in self._kept(space, part)]
        return space.check([*space.fixed, *kept], what=self.name)

    def places(self, n: int, k: int) -> list[int]:
        """The places of `k` units to keep among `n`."""
        raise NotImplementedError

    def _kept(self, space: Space, part: Part) -> list[int]:
        free = space.free(part)
        return [free[i] for i in self.places(len(free), space.num_free_kept(part))]


class First(_ByPlace):
    """Keeps the first units."""

    name = "first"

    def places(self, n: int, k: int) -> list[int]:
        """0, 1, ..., k - 1."""
        return list(range(k))


class Uniform(_ByPlace):
    """Keeps units at equal distances, the first among them: every second one for half."""

    name = "uniform"

    def places(self, n: int, k: int) -> list[int]:
        """Equal distances, starting at 0."""
        return [i * n // k for i in range(k)]


class Oracle(_ByPlace):
    """BK-SDM's rule for half the depth.

    It keeps the first of each pair in the first half, the last of each pair in the second.

    With an odd count of pairs the middle one keeps its first: of 28 units 0, 2, ..., 12, 15, ...,
    27; of 14 units 0, 2, 4, 6, 9, 11, 13. (Kim et al., BK-SDM, arXiv 2305.15798; the "oracle" of
    TinyFusion's tables 1 and 3.)
    """

    name = "oracle"

    def places(self, n: int, k: int) -> list[int]:
        """One place of each pair.

        Raises:
            ValueError: If `k` is not half of `n`.
        """
        if n % 2:
            raise ValueError(
                f"The oracle rule keeps one block of each pair, and {n} make no pairs. Use "
                "pruning=uniform."
            )
        if n != 2 * k:
            raise ValueError(
                f"keep comes to {k} of {n}, but the oracle rule keeps half. Give keep={n // 2}, "
                "or use pruning=uniform."
            )
        return [2 * i + (i >= (k + 1) // 2) for i in range(k)]


class Random:
    """Keeps units at random, by the seed."""

    name = "random"

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        theta = torch.zeros(problem.space.num_units)
        return Choice(
            sample_structures(problem.space, theta, 1, generator=problem.generator(CANDIDATES))[0]
        )


class Index:
    """Keeps the units that are named.

    Args:
        kept: Indices of the units of the stack, or for each stack path those of its own.
    """

    name = "index"

    def __init__(self, kept: Sequence[int] | Mapping[str, Sequence[int]]) -> None:
        self.kept = kept

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        return Choice(self.check(problem.space))

    def check(self, space: Space) -> Tensor:
        """The structure; `ValueError` where the units are not of the budget."""
        if not isinstance(self.kept, Mapping):
            if len(space.paths) > 1:
                raise ValueError(
                    f"kept is one list, but there are several stacks: {', '.join(space.paths)}. "
                    "Give a list for each."
                )
            return space.check(list(self.kept), what="kept")
        kept = by_path(self.kept, space.paths, "kept")
        for path in space.paths:
            if wrong := [i for i in kept[path] if not 0 <= i < len(space.units[path])]:
                raise ValueError(
                    f"kept names the units {wrong} of {path}; there are 0 to "
                    f"{len(space.units[path]) - 1}."
                )
        return space.check(
            [space.members(p).start + i for p in space.paths for i in kept[p]], what="kept"
        )
