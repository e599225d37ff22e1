"""Temperature of the Gumbel-softmax over training (TinyFusion, appendix: 4 -> 0.1)."""

from __future__ import annotations


def linear_anneal(step: int, num_steps: int, *, start: float, end: float) -> float:
    """Value at `step`, going from `start` at step 0 in a straight line to `end` at step `num_steps` - 1 and staying there."""
    if num_steps <= 1 or step >= num_steps - 1:
        return end
    return start + (end - start) * max(step, 0) / (num_steps - 1)
