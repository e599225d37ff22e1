"""Learning rate schedules, in optimizer steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_with_warmup(
    optimizer: Optimizer, *, num_steps: int, num_warmup_steps: int = 0, final_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then half a cosine from the full rate to `final_ratio` of it.

    Args:
        optimizer: The optimizer whose learning rates it scales.
        num_steps: Number of optimizer steps of the training.
        num_warmup_steps: Number of warm-up steps, >= 0 and less than `num_steps`.
        final_ratio: Learning rate at `num_steps` as a fraction of the full one, in [0, 1].

    Raises:
        ValueError: for a warm-up as long as the training, or a ratio outside [0, 1].
    """
    if not 0 <= num_warmup_steps < num_steps:
        raise ValueError(
            f"num_warmup_steps is {num_warmup_steps} of {num_steps} steps; give an integer >= 0 "
            f"and < {num_steps}."
        )
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_ratio is {final_ratio}; give a number in [0, 1].")

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        progress = min(1.0, (step - num_warmup_steps) / (num_steps - num_warmup_steps))
        return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)
