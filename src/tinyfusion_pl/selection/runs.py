"""Contiguous runs of units: where a run may begin, and the best division into k of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from tinyfusion_pl.pruning.blocks import Units
from tinyfusion_pl.selection.space import Part, Space


def sections(units: Units) -> list[tuple[tuple[int, ...], ...]]:
    """The contiguous blocks of each unit.

    One section for a unit of neighboring blocks, else one for each block.

    Raises:
        ValueError: for units of unequal numbers of blocks that are no neighbors.
    """
    ordered = [tuple(sorted(unit)) for unit in units]
    if all(unit == tuple(range(unit[0], unit[-1] + 1)) for unit in ordered):
        return [(unit,) for unit in ordered]
    if len({len(unit) for unit in units}) > 1:
        raise ValueError(
            f"The units {[list(unit) for unit in units]} hold unequal numbers of blocks that are "
            "no neighbors, so that there are no runs of them to compare. Use another criterion, "
            "e.g. pruning=greedy."
        )
    return [tuple((block,) for block in unit) for unit in units]


def directions(units: Units) -> list[int]:
    """Direction of each section: 1 if later units lie behind it, -1 if before.

    The out blocks of mirrored pairs go backward.
    """
    each = sections(units)
    if len(each) == 1:
        return [1] * len(each[0])
    return [1 if later[0] > first[0] else -1 for first, later in zip(each[0], each[1])]


def run_starts(space: Space, part: Part) -> list[int]:
    """Units of `part` that always begin a run.

    These are the first of the part and of each stack, those that have to stay, and those whose
    blocks do not follow those of the unit before.
    """
    starts = []
    for path in space.paths:
        units, first = space.units[path], space.members(path).start
        each, ways = sections(units), directions(units)
        for before, unit in zip((None, *part.members), part.members):
            if unit not in space.members(path):
                continue
            if before is None or before not in space.members(path) or unit in space.fixed:
                starts.append(unit)
                continue
            mine, theirs = each[unit - first], each[before - first]
            follow = [
                a[0] == b[-1] + 1 if way > 0 else a[-1] == b[0] - 1
                for a, b, way in zip(mine, theirs, ways)
            ]
            if not all(follow):
                starts.append(unit)
    return starts


def best_runs(
    values: Sequence[Sequence[float]], num_runs: int, *, starts: Collection[int] = ()
) -> list[int]:
    """First members of the `num_runs` contiguous runs with the largest sum of values, ascending.

    Dynamic programming over the members, O(n^2 k). Of equal divisions the one with the earlier
    starts.

    Args:
        values: (n, n), the value of the run from i to j at ``[i][j]``, i <= j.
        num_runs: k, from 1 to n.
        starts: Members that begin a run; the first one does in any case.

    Raises:
        ValueError: where more members begin a run than there are runs.
    """
    n = len(values)
    best = [
        [-math.inf] * (num_runs + 1) for _ in range(n + 1)
    ]  # of the first so many members, by number of runs
    begin = [[0] * (num_runs + 1) for _ in range(n + 1)]
    best[0][0] = 0.0
    for end in range(1, n + 1):
        for start in range(end - 1, -1, -1):
            for count in range(1, num_runs + 1):
                total = best[start][count - 1] + values[start][end - 1]
                if total > -math.inf and total >= best[end][count]:
                    best[end][count], begin[end][count] = total, start
            if start in starts:
                break  # a run from further on would hold it inside
    if best[n][num_runs] == -math.inf:
        raise ValueError(
            f"{n} members cannot be divided into {num_runs} runs where {sorted(starts)} begin one."
        )
    found, end = [], n
    for count in range(num_runs, 0, -1):
        end = begin[end][count]
        found.append(end)
    return found[::-1]
