"""What is lost when one block alone goes."""

from __future__ import annotations

import torch

from tinyfusion_pl.selection.problem import Choice, Problem


class Sensitivity:
    """Keeps the units whose removal, each alone, raises the loss most.

    Args:
        measure: ``"loss"`` of the objective, or ``"distance"`` to the dense model's output.
    """

    name = "sensitivity"

    def __init__(self, *, measure: str = "loss") -> None:
        self.measure = check_measure(measure)

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        n = problem.space.num_units
        structures = torch.cat(
            [torch.ones(1, n, dtype=torch.bool), ~torch.eye(n, dtype=torch.bool)]
        )
        whole, *without = problem.structures.means(problem.fixed, structures, self.measure)
        scores = torch.stack(without) - whole
        return Choice(problem.space.top(scores), scores)


def check_measure(measure: str) -> str:
    """`ValueError` for what cannot be measured."""
    if measure not in ("loss", "distance"):
        raise ValueError(
            f"measure is {measure!r}; give 'loss' (of the objective) or 'distance' (to the dense "
            "model's output)."
        )
    return measure
