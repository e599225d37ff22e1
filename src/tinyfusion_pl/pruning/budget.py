"""How much stays: a pattern, or a number of units, stated in one of two ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tinyfusion_pl.pruning.patterns import MAX_CANDIDATES, Pattern, smaller_groups


class Budget:
    """What stays of each stack where masks are learned, one of `pattern` and `keep`.

    Args:
        pattern: ``"N:M"``, or a mapping from stack path.
        keep: Units that stay, all units of a stack being one group: a count, or a share in (0, 1)
            of each stack; or a mapping from stack path.
        enumerated: Whether the candidates of each group are enumerated, so that their number is
            bounded (`MAX_CANDIDATES`).

    Attributes:
        what: ``"pattern"`` or ``"keep"``.
        stated: What was given for it.

    Raises:
        ValueError: for neither or both, for anything but a pattern or a number, and for a pattern
            that keeps every block.
    """

    def __init__(self, pattern: Any = None, keep: Any = None, *, enumerated: bool = True) -> None:
        if (keep is None) == (pattern is None):
            raise ValueError(both_or_neither(keep, pattern))
        self.what, self.stated, self.enumerated = (
            ("keep", keep, enumerated) if pattern is None else ("pattern", pattern, enumerated)
        )
        values = list(self.stated.values()) if self.is_by_path else [self.stated]
        if self.what == "keep":
            for value in values:
                check_keep(value)
            return
        parsed = [Pattern.parse(each, enumerated=enumerated) for each in values]
        if parsed and all(
            num_kept == num_blocks for each in parsed for num_kept, num_blocks in each.terms
        ):
            raise ValueError(
                f"The pattern {pattern!r} keeps every block, so that there is nothing to learn. Give N:M with N < M in one "
                "place at least, e.g. '1:2', or '4:4+2:4', which leaves each first group whole."
            )

    @property
    def is_by_path(self) -> bool:
        """Whether each stack is given its own, by path."""
        return isinstance(self.stated, Mapping)

    def check_stacks(self, paths: Sequence[str]) -> None:
        """`ValueError` for one count where there are several stacks, which could be meant of each or of all together."""
        if (
            self.what == "keep"
            and not self.is_by_path
            and not 0 < self.stated < 1
            and len(paths) > 1
        ):
            counts = ", ".join(f"{path}: COUNT" for path in paths)
            raise ValueError(
                f"keep is {self.stated}, one count for several stacks ({', '.join(paths)}), and masks are learned for each of them. Give "
                f"a count for each, keep={{{counts}}}, or a share of each in (0, 1)."
            )

    def pattern(self, stated: Any, num_units: int, *, path: str) -> Pattern:
        """The pattern of one stack.

        Args:
            stated: What was given for it.
            num_units: Units of the stack.
            path: Its path, for messages.

        Raises:
            ValueError: for a count or share that leaves none or all of the units, and for too many
                candidates.
        """
        if self.what == "pattern":
            return Pattern.parse(stated, enumerated=self.enumerated)
        count = get_count(stated, num_units, path)
        if self.enumerated and (number := math.comb(num_units, count)) > MAX_CANDIDATES:
            raise ValueError(
                f"keep is {stated}: there are {number} ways to keep {count} of the {num_units} units of {path}, more than the "
                f"{MAX_CANDIDATES} candidates that are enumerated. Divide them into groups, pattern="
                f"{smaller_groups(count, num_units)!r}, or use relaxation='hard_concrete' or pruning=global, which enumerate none."
            )
        return Pattern(((count, num_units),))


def both_or_neither(keep: Any, pattern: Any) -> str:
    """What is wrong with a budget that is stated twice or not at all."""
    if keep is None:
        stated = "neither is given, keep=None and pattern=None: set one of them"
    else:
        stated = f"both are given, keep={keep} and pattern={pattern!r}: set the other one to null"
    return f"keep (how many units stay, or their share) or pattern ('N:M', N kept of every M) states what stays; {stated}."


def check_keep(keep: Any) -> None:
    """`ValueError` for what is no number."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not math.isfinite(keep):
        raise ValueError(f"keep is {keep!r}; give a count of units, or their share in (0, 1).")


def get_count(keep: Any, num_units: int, where: str) -> int:
    """The units that stay of `num_units`, of a count or a share.

    Raises:
        ValueError: where that is none or all of them, or no number.
    """
    check_keep(keep)
    count = round(keep * num_units) if 0 < keep < 1 else keep
    if count != int(count) or not 1 <= count < num_units:
        raise ValueError(
            f"keep is {keep} of the {num_units} units of {where}; give a count from 1 to {num_units - 1}, or a share in "
            "(0, 1) that leaves one at least."
        )
    return int(count)
