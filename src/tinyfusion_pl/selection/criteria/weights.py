"""Scores of a block's weights: their size, and what a first-order change of each costs."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfusion_pl.pruning.blocks import get_stack, unwrap
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.selection.problem import Choice, Problem


class Magnitude:
    """Keeps the units with the largest weights: sum of |w|."""

    name = "magnitude"

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        scores = torch.tensor(
            [
                sum(float(p.detach().abs().double().sum()) for p in each)
                for each in _parameters(problem)
            ]
        )
        return Choice(problem.space.top(scores), scores)


class Taylor:
    """Keeps the units with the largest sum of |w * dloss/dw| over the fixed samples.

    First-order Taylor expansion.

    Args:
        batch_size: Samples of one backward pass.
    """

    name = "taylor"

    def __init__(self, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more.")
        self.batch_size = batch_size

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        calibration, units = problem.fixed, _parameters(problem)
        unique = list({id(p): p for each in units for p in each}.values())
        sums = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in unique}
        needed = [p.requires_grad for p in unique]
        try:
            for p in unique:
                p.requires_grad_(True)
            for index in torch.arange(calibration.num_samples).split(self.batch_size):
                args, kwargs = calibration.rows(index)
                with quiet(problem.model), torch.enable_grad(), problem.structures.gates.bypass():
                    loss = (
                        calibration.losses(problem.model(*args, **kwargs), index).sum()
                        / calibration.num_samples
                    )
                    grads = torch.autograd.grad(loss, unique, allow_unused=True)
                for p, grad in zip(unique, grads):
                    if grad is not None:
                        sums[id(p)] += grad.float()
        finally:
            for p, was in zip(unique, needed):
                p.requires_grad_(was)
        problem.structures.num_block_runs += (
            3 * sum(problem.space.num_blocks.values()) * calibration.num_samples
        )
        scores = torch.tensor(
            [
                sum(float((p.detach().float() * sums[id(p)]).abs().double().sum()) for p in each)
                for each in units
            ]
        )
        return Choice(problem.space.top(scores), scores)


def _parameters(problem: Problem) -> list[list[Tensor]]:
    """The weights of each unit."""
    space = problem.space
    return [
        [p for block in unit for p in unwrap(get_stack(problem.model, path)[block]).parameters()]
        for path in space.paths
        for unit in space.units[path]
    ]
