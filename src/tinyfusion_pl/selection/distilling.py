"""Output distillation of a candidate in a few steps: what trials and healing train by."""

from __future__ import annotations

import torch
from torch import nn

from tinyfusion_pl.selection.calibration import Calibration
from tinyfusion_pl.selection.problem import Problem


class Distilling:
    """A model in training towards the dense model's output.

    The loss is 0.9 of the distance to the dense model's output and 0.1 of the data's loss, the
    distance alone where there is no loss; AdamW at a constant rate. Its random numbers (dropout)
    are those of `which` and the step.

    Args:
        problem: Whose block runs the steps are counted in, a step as three forward passes.
        student: The model, in place; blocks may be taken out of it and put back between steps.
        lr: Learning rate, > 0.
        which: Purpose of the random numbers, see `Problem`.
    """

    def __init__(self, problem: Problem, student: nn.Module, *, lr: float, which: int) -> None:
        self.problem, self.student, self.which, self.num_steps = (
            problem,
            student.train().requires_grad_(True),
            which,
            0,
        )
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)

    def step(self, calibration: Calibration, *, num_blocks: int) -> None:
        """One step on all samples, which need a target; `num_blocks` blocks run."""
        index = torch.arange(calibration.num_samples)
        self.optimizer.zero_grad()
        with self.problem.seeded(self.which, 0, self.num_steps), torch.enable_grad():
            output = self.student(*calibration.args, **calibration.kwargs)
            loss = calibration.distances(output, index).mean()
            if calibration.has_loss:
                loss = 0.9 * loss + 0.1 * calibration.losses(output, index).mean()
            loss.backward()
        self.optimizer.step()
        self.num_steps += 1
        self.problem.structures.num_block_runs += 3 * num_blocks * calibration.num_samples
