"""Interval distillation: each kept block learns to replace a run of the teacher's blocks.

PPCL, arXiv 2511.16156.

Kept block b_i stands for the teacher's blocks from b_i, or 0 for the first one, to b_{i+1} - 1, or
the last block. It is called as the teacher called the first block of that run, with the teacher's
own hidden states and conditioning, and compared with what the last block of the run returned. No
block waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tinyfusion_pl.distill.pairs import check_decision, resolve_path
from tinyfusion_pl.pruning import Decision
from tinyfusion_pl.pruning.blocks import stated_units


@dataclass(frozen=True)
class Interval:
    """A kept block of the student, and the first and last block of its run in the teacher."""

    block: int
    first: int
    last: int

    @property
    def num_blocks(self) -> int:
        """Number of the teacher's blocks in the run."""
        return self.last - self.first + 1


Intervals = Mapping[str, Sequence[Interval]]


def get_intervals(kept_blocks: Sequence[int], num_blocks: int) -> list[Interval]:
    """The interval of each of `kept_blocks` (ascending); together they cover `num_blocks`."""
    starts = [0, *kept_blocks[1:]]
    ends = [*(start - 1 for start in starts[1:]), num_blocks - 1]
    return [Interval(i, first, last) for i, (first, last) in enumerate(zip(starts, ends))]


def check_single_blocks(
    model: nn.Module, path: str, units: Sequence[Sequence[int]] | None = None
) -> None:
    """Raise ValueError for a stack whose blocks only go together.

    Under long skips a run is more than a map of hidden states.

    Args:
        model: The dense model.
        path: Path of the stack.
        units: Those that a decision on it counted.
    """
    whole = [unit for unit in (*(units or ()), *(stated_units(model, path) or ())) if len(unit) > 1]
    if whole:
        raise ValueError(
            f"Interval distillation calls each block of '{path}' alone, but some only go "
            f"together, as {list(whole[0])}: what a long skip carries past a run cannot be given "
            "to one block. Use another one of distill=output, lift, representation or masked "
            "(weight_interval=0)."
        )


def resolve_intervals(
    decision: Decision,
    student: nn.Module,
    teacher: nn.Module,
    *,
    module: str = "",
    owner: nn.Module | None = None,
) -> dict[str, list[Interval]]:
    """The intervals of a decision by stack path in `student`.

    See `resolve_pairs` for the arguments.

    Raises:
        ValueError: when a path is none of the student's stacks, the depths are not those of the
            decision, or blocks only go together.
    """
    found = {}
    for path, stack in decision.stacks.items():
        if (inside := resolve_path(path, student, module, owner)) is None:
            continue
        check_single_blocks(teacher, inside, stack.units)
        check_decision(stack, inside, student, teacher)
        found[inside] = get_intervals(stack.kept_blocks, stack.num_blocks)
    return found
