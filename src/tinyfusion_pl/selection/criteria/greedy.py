"""Removes one unit at a time, each time the one whose removal costs least."""

from __future__ import annotations

import torch

from tinyfusion_pl.selection.criteria.sensitivity import check_measure
from tinyfusion_pl.selection.problem import Choice, Problem


class Greedy:
    """Removes units one by one.

    The score of a unit is the round in which it went, higher for later; kept units share the highest.

    Args:
        measure: ``"loss"`` of the objective, or ``"distance"`` to the dense model's output.
    """

    name = "greedy"

    def __init__(self, *, measure: str = "distance") -> None:
        self.measure = check_measure(measure)

    def __call__(self, problem: Problem) -> Choice:
        space = problem.space
        structure = torch.ones(space.num_units, dtype=torch.bool)
        left = [len(space.free(part)) - space.num_free_kept(part) for part in space.parts]
        num_rounds = sum(left)
        scores = torch.full((space.num_units,), float(num_rounds), dtype=torch.float64)
        for step in range(num_rounds):
            candidates = [(n, i) for n, part in enumerate(space.parts) if left[n] for i in space.free(part) if structure[i]]
            trials = structure.repeat(len(candidates), 1)
            trials[torch.arange(len(candidates)), torch.tensor([i for _, i in candidates])] = False
            valid = [row for row in range(len(trials)) if space.is_valid(trials[row])]  # every stack keeps a block
            candidates, trials = [candidates[row] for row in valid], trials[valid]
            best = int(problem.structures.means(problem.fixed, trials, self.measure).argmin())
            part, unit = candidates[best]
            structure[unit], scores[unit] = False, float(step)
            left[part] -= 1
        return Choice(structure, scores)
