"""Structures under which gates are held against cut blocks: every group drops something, as early or as late as it can."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from tinyfusion_pl.pruning.stack_gates import StackGates

Structure = dict[str, list[int]]  # units that stay, by stack path


def earliest_drops(gates: StackGates) -> list[int]:
    """Units of a structure in which every group drops something, as early in the stack as it can."""
    return _kept(gates, latest=False)


def latest_drops(gates: StackGates) -> list[int]:
    """Units of a structure in which every group drops something, as late in the stack as it can."""
    return _kept(gates, latest=True)


def joint_structures(stacks: Sequence[StackGates]) -> list[Structure]:
    """Early drops in all stacks, and late ones: a first or a last block may be treated unlike the others."""
    found = [{g.path: drops(g) for g in stacks} for drops in (earliest_drops, latest_drops)]
    return found if found[0] != found[1] else found[:1]


def mixed_structures(stacks: Sequence[StackGates]) -> list[Structure]:
    """Early drops in one stack beside late ones in the next, and the other way round: the blocks of both may run in turn."""
    if len(stacks) < 2:
        return []
    return [
        {g.path: (earliest_drops, latest_drops)[(i + first) % 2](g) for i, g in enumerate(stacks)}
        for first in (0, 1)
    ]


def _kept(gates: StackGates, *, latest: bool) -> list[int]:
    kept = []
    for group, distribution in zip(gates.groups, gates.distributions):
        own, generator = copy.deepcopy(distribution).cpu(), torch.Generator().manual_seed(0)
        outcomes = [own.decide(torch.randn(own.num_logits, generator=generator)) for _ in range(32)]
        masks = [[i in outcome for i in range(own.num_members)] for outcome in outcomes]
        kept += [
            group.start + i for i, keep in enumerate(max(masks) if latest else min(masks)) if keep
        ]
    return kept
