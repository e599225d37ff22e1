"""Pattern grammar: which share of each run of blocks stays (TinyFusion, arXiv 2412.01199, section 3.2, "local structures").

``"2:4"`` keeps 2 of every 4 consecutive blocks, ``"7:14"`` 7 of every 14; ``"3:4+3:4+2:4"`` gives
each group its own numbers. A pattern is repeated until it covers the depth.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BLOCKS = (
    1024  # of one group; no transformer has as many, and the count below takes long for more
)
MAX_CANDIDATES = 20_000
"""Most candidates of one group that are enumerated; 8:16 has 12870, 9:18 has 48620."""


@dataclass(frozen=True)
class Group:
    """`num_blocks` consecutive members of a stack from `start` on, of which `num_kept` stay."""

    start: int
    num_kept: int
    num_blocks: int

    @property
    def members(self) -> range:
        return range(self.start, self.start + self.num_blocks)

    def always(self, fixed: Collection[int]) -> list[int]:
        """Members of the group (0-based in it, ascending) that are among `fixed`, members of the stack.

        Raises:
            ValueError: when they are more than the group keeps.
        """
        always = sorted({member - self.start for member in fixed if member in self.members})
        if len(always) > self.num_kept:
            raise ValueError(
                f"The pattern keeps {self.num_kept} of the units {self.start}..{self.members[-1]}, but "
                f"{', '.join(str(i + self.start) for i in always)} have to stay. "
                "Give a pattern that keeps more of them."
            )
        return always

    def candidates(self, *, fixed: Collection[int] = ()) -> Tensor:
        """All ways to keep `num_kept` of `num_blocks`, in lexicographic order: float32 (num_candidates, M) of zeros and ones.

        Args:
            fixed: Members of the stack, in this group or not, that every candidate keeps.

        Raises:
            ValueError: when more members of the group are fixed than it keeps, and for too many
                candidates.
        """
        always = set(self.always(fixed))
        _check_candidates(self.num_kept, self.num_blocks, of=f"The stack from unit {self.start} on")
        rows = [
            row
            for row in itertools.combinations(range(self.num_blocks), self.num_kept)
            if always <= set(row)
        ]
        onehot = torch.zeros(len(rows), self.num_blocks, dtype=torch.float32)
        return onehot.scatter_(1, torch.tensor(rows), 1.0)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: the ``(num_kept, num_blocks)`` of each group before repetition."""

    terms: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, pattern: str | Pattern, *, enumerated: bool = True) -> Pattern:
        """Read ``"N:M"`` or ``"N:M+N:M+..."``, N kept of M.

        Args:
            pattern: The text, or a parsed pattern, which is returned.
            enumerated: Whether each group's candidates will be enumerated, so that their number is
                bounded.

        Raises:
            ValueError: for anything but such a string; a number is refused with the reason (YAML
                reads an unquoted 1:2 as 62).
        """
        if isinstance(pattern, Pattern):
            return pattern
        if isinstance(pattern, (int, float)):
            raise ValueError(
                f"The pattern came as the number {pattern!r}. YAML reads an unquoted 1:2 as the number 62 (2:4 as 124, 7:14 as 434): "
                """put it in quotes, pattern: "1:2"; on the command line write 'pruning.pattern="1:2"' with the inner quotes."""
            )
        if not isinstance(pattern, str):
            raise ValueError(
                f"A pattern is a string such as '1:2' or '3:4+2:4', not {type(pattern).__name__} {pattern!r}."
            )
        terms = []
        for term in pattern.split("+"):
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", term)
            if match is None:
                raise ValueError(
                    f"Pattern {pattern!r} is not of the form N:M or N:M+N:M (N kept of M), e.g. '2:4' or '3:4+2:4'."
                )
            num_kept, num_blocks = int(match[1]), int(match[2])
            if not 1 <= num_kept <= num_blocks:
                raise ValueError(
                    f"Pattern {pattern!r} keeps {num_kept} of {num_blocks} blocks. Give N:M with 1 <= N <= M, e.g. '2:4'."
                )
            if num_blocks > MAX_BLOCKS:
                raise ValueError(
                    f"Pattern {pattern!r} has a group of {num_blocks} blocks; give {MAX_BLOCKS} at most, e.g. '2:4'."
                )
            if enumerated:
                _check_candidates(num_kept, num_blocks, of=f"Pattern {pattern!r}")
            terms.append((num_kept, num_blocks))
        return cls(tuple(terms))

    @property
    def span(self) -> int:
        """Blocks covered by one repetition."""
        return sum(num_blocks for _, num_blocks in self.terms)

    def groups(self, depth: int) -> tuple[Group, ...]:
        """The groups of a stack of `depth` members, the pattern repeated to the depth.

        Raises:
            ValueError: when the depth is no multiple of the pattern's span; names patterns that
                would fit.
        """
        if depth % self.span:
            fitting = [m for m in range(2, depth + 1) if depth % m == 0 and m <= 16]
            would = ", ".join(repr(f"{max(1, m // 2)}:{m}") for m in fitting) or f"'1:{depth}'"
            raise ValueError(
                f"Pattern '{self}' covers {self.span} blocks, which does not divide the depth {depth}. "
                f"For {depth} blocks, groups of M blocks divide where M is one of {fitting or [depth]}, e.g. {would}."
            )
        groups, start = [], 0
        for num_kept, num_blocks in self.terms * (depth // self.span):
            groups.append(Group(start, num_kept, num_blocks))
            start += num_blocks
        return tuple(groups)

    def num_kept(self, depth: int) -> int:
        """Members that stay of a stack of `depth`."""
        return sum(group.num_kept for group in self.groups(depth))

    def __str__(self) -> str:
        return "+".join(f"{n}:{m}" for n, m in self.terms)


def smaller_groups(num_kept: int, num_blocks: int) -> str:
    """A pattern of the same share in as few equal-sized groups as the bound on candidates allows."""
    for parts in range(2, num_blocks + 1):
        terms = [
            (
                num_kept * (i + 1) // parts - num_kept * i // parts,
                num_blocks * (i + 1) // parts - num_blocks * i // parts,
            )
            for i in range(parts)
        ]
        if all(1 <= n <= m and math.comb(m, n) <= MAX_CANDIDATES for n, m in terms):
            return str(Pattern(tuple(terms)))
    return "1:2"


def _check_candidates(num_kept: int, num_blocks: int, *, of: str) -> None:
    """`ValueError` for a group with more candidates than are enumerated."""
    if (count := math.comb(num_blocks, num_kept)) > MAX_CANDIDATES:
        raise ValueError(
            f"{of} has a group {num_kept}:{num_blocks} with {count} candidates, more than the {MAX_CANDIDATES} "
            f"that are enumerated. Use smaller groups, e.g. {smaller_groups(num_kept, num_blocks)!r} (7:14 has 3432 candidates), "
            "or relaxation='hard_concrete', which enumerates none."
        )
