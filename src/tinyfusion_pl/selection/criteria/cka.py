"""Contiguous runs of blocks with similar hidden states; the first block of each run stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinyfusion_pl.pruning.gating import GatedForward
from tinyfusion_pl.pruning.streams import Key
from tinyfusion_pl.selection.problem import CANDIDATES, Choice, Problem
from tinyfusion_pl.selection.runs import best_runs, directions, run_starts, sections
from tinyfusion_pl.selection.space import Space
from tinyfusion_pl.selection.watching import watch_blocks

MIN_ROWS = 4  # that the unbiased estimate needs

States = dict[
    tuple[str, int], dict[Key, tuple[Tensor, Tensor]]
]  # (stack, block) -> rows of each stream before and after it


class CKA:
    """Divides the units into contiguous runs and keeps the first unit of each.

    There are as many runs as units to keep.

    The value of a run is the linear CKA between the hidden states after its first and after its
    last unit: how well the unit that stays stands for the run (1 for a run of one unit). The
    division with the largest sum is found by dynamic programming. Of mirrored pairs, whose out
    blocks come in reverse, each half counts for half: there it is the states before the block that
    stays and before the run's first one, which it takes its place. Streams of a block are averaged.

    CKA is that of Kornblith et al. 2019 (arXiv 1905.00414, section 3) by the unbiased estimate of
    HSIC (Song et al. 2012), which does not grow where there are more channels than rows. Rows are
    tokens of samples. That redundant blocks are contiguous and found by CKA is PPCL's (Ma et al.,
    arXiv 2511.16156), which reads intervals off linear probes and differences; here the budget is
    exact.

    A unit's score is 1 - CKA of its own input and output; runs decide, not scores.

    Args:
        num_rows: Most rows that are compared, drawn at random by the seed, >= 4; memory grows with
            its square.
    """

    name = "cka"

    def __init__(self, *, num_rows: int = 1024) -> None:
        if num_rows < MIN_ROWS:
            raise ValueError(f"num_rows is {num_rows}; give {MIN_ROWS} or more.")
        self.num_rows = num_rows

    def check(self, space: Space) -> None:
        """Find out whether the budget leaves as many runs as units have to begin one.

        Raises:
            ValueError: when it does not, and for units that have no runs.
        """
        for part in space.parts:
            starts = run_starts(space, part)
            if len(starts) > part.num_kept:
                raise ValueError(
                    f"{part.num_kept} of the units {part.members[0]} to {part.members[-1]} are to "
                    f"stay, but {len(starts)} of them begin a run whatever their states are "
                    f"({', '.join(map(str, starts))}: the first of the group and of each stack, "
                    "those that have to stay, and those behind a gap), and cka keeps the first "
                    "unit of each run. Keep more of them, or use another criterion, e.g. "
                    "pruning=greedy."
                )

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        space = problem.space
        self.check(space)
        states = self._states(problem)
        values = torch.zeros(space.num_units, space.num_units, dtype=torch.float64)
        scores = torch.zeros(space.num_units, dtype=torch.float64)
        for path in space.paths:
            members, of_path = (
                space.members(path),
                slice(space.members(path).start, space.members(path).stop),
            )
            each, ways = sections(space.units[path]), directions(space.units[path])
            for place, way in enumerate(ways):
                blocks = [unit[place] for unit in each]
                values[of_path, of_path] += _similarity(states, path, blocks, way) / len(ways)
                for unit, section in zip(members, blocks):
                    scores[unit] += (1 - _passed_on(states, path, section)) / len(ways)
        kept = []
        for part in space.parts:
            of_part = values[list(part.members)][:, list(part.members)].tolist()
            starts = [part.members.index(unit) for unit in run_starts(space, part)]
            kept += [part.members[i] for i in best_runs(of_part, part.num_kept, starts=starts)]
        return Choice(space.check(kept, what=self.name), scores)

    def _states(self, problem: Problem) -> States:
        found: States = {}
        chosen: dict[int, Tensor] = {}

        def rows(state: Tensor) -> Tensor:
            flat = state.flatten(0, -2)  # (rows, channels)
            if len(flat) < MIN_ROWS:
                raise ValueError(
                    f"The hidden states have {len(flat)} rows (tokens of samples), and CKA needs "
                    f"{MIN_ROWS} at least. Raise num_samples."
                )
            if len(flat) not in chosen:
                chosen[len(flat)] = torch.randperm(
                    len(flat), generator=problem.generator(CANDIDATES)
                )[: self.num_rows]
            return flat.index_select(0, chosen[len(flat)].to(flat.device)).float().cpu()

        def watch(
            gated: GatedForward, inputs: Mapping[Key, Tensor], outputs: Mapping[Key, Tensor]
        ) -> None:
            block = int(gated.name.rpartition(".")[2])
            found[gated.gates.path, block] = {
                key: (rows(x), rows(outputs[key])) for key, x in inputs.items()
            }

        watch_blocks(problem, watch)
        return found


def _similarity(states: States, path: str, blocks: Sequence[tuple[int, ...]], way: int) -> Tensor:
    """CKA of the states after (`way` -1: before) the units at one place: (n, n).

    Averaged over the streams that all units have.
    """
    keys = [
        key
        for key in states[path, blocks[0][0]]
        if all(key in states[path, b] for section in blocks for b in section)
    ]
    each = []
    for key in keys:
        of_units = [
            states[path, s[-1]][key][1] if way > 0 else states[path, s[0]][key][0] for s in blocks
        ]
        each.append(linear_cka(of_units))
    return torch.stack(each).mean(0)


def _passed_on(states: States, path: str, section: tuple[int, ...]) -> float:
    """CKA of what goes into a section and what comes out, averaged over the streams."""
    first, last = states[path, section[0]], states[path, section[-1]]
    return sum(float(linear_cka([x, last[key][1]])[0, 1]) for key, (x, _) in first.items()) / len(
        first
    )


def linear_cka(states: Sequence[Tensor]) -> Tensor:
    """Linear CKA between any two of `states`: (n, n) float64, the diagonal 1.

    Each state is (R, channels) with the same R >= 4 rows.

    By the unbiased estimate of HSIC: the scalar product of the Gram matrices with their diagonals
    left out, centered so that every row sums to zero (U-centering). It may be slightly below 0 for
    states that have nothing in common; of constant states it is 0.
    """
    grams = []
    for state in states:
        x = state.double()
        x = x - x.mean(0)  # changes nothing but rounding
        gram = (x @ x.t()).fill_diagonal_(0.0)  # (R, R)
        n, sums = len(gram), gram.sum(1)
        gram += sums.sum() / ((n - 1) * (n - 2)) - (sums[:, None] + sums) / (n - 2)
        gram = gram.fill_diagonal_(0.0).flatten()
        grams.append(gram / gram.norm().clamp_min(1e-300))
    stacked = torch.stack(grams)
    return (stacked @ stacked.t()).fill_diagonal_(1.0)
