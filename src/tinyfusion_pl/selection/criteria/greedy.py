"""Remove one unit at a time, each time the cheapest, optionally with healing in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tinyfusion_pl.pruning.surgery import blocks_removed
from tinyfusion_pl.selection.criteria.sensitivity import check_measure
from tinyfusion_pl.selection.distilling import Distilling
from tinyfusion_pl.selection.problem import HEALING, Choice, Problem
from tinyfusion_pl.selection.structures import Structures, open_structures

Heal = Callable[[Tensor], None]


class Greedy:
    """Removes units one by one.

    With `healing_steps`, a working copy learns from the dense model's output for so many steps
    after each removal, and the next removals are scored on that copy. The copy is thrown away: what
    is cut in the end are the original weights.

    The score of a unit is the round in which it went, higher for later; kept units share the
    highest.

    Args:
        measure: ``"loss"`` of the objective, or ``"distance"`` to the dense model's output.
        healing_steps: Steps of output distillation after each removal but the last one, >= 0 (see
            `Distilling`).
        healing_batch_size: Samples of a step.
        healing_lr: Learning rate of AdamW, > 0.
    """

    name = "greedy"

    def __init__(
        self,
        *,
        measure: str = "distance",
        healing_steps: int = 0,
        healing_batch_size: int = 128,
        healing_lr: float = 1e-3,
    ) -> None:
        self.measure = check_measure(measure)
        if healing_steps < 0:
            raise ValueError(f"healing_steps is {healing_steps}; give 0 (no healing) or more.")
        if healing_batch_size < 1:
            raise ValueError(f"healing_batch_size is {healing_batch_size}; give 1 or more.")
        if not healing_lr > 0:
            raise ValueError(f"healing_lr is {healing_lr}; give a number > 0.")
        self.healing_steps, self.healing_batch_size, self.healing_lr = (
            healing_steps,
            healing_batch_size,
            healing_lr,
        )

    def __call__(self, problem: Problem) -> Choice:
        """Choose the units that stay."""
        space = problem.space
        structure = torch.ones(space.num_units, dtype=torch.bool)
        left = [len(space.free(part)) - space.num_free_kept(part) for part in space.parts]
        num_rounds = sum(left)
        scores = torch.full((space.num_units,), float(num_rounds), dtype=torch.float64)
        with self._working(problem) as (structures, heal):
            for step in range(num_rounds):
                candidates = [
                    (n, i)
                    for n, part in enumerate(space.parts)
                    if left[n]
                    for i in space.free(part)
                    if structure[i]
                ]
                trials = structure.repeat(len(candidates), 1)
                trials[torch.arange(len(candidates)), torch.tensor([i for _, i in candidates])] = (
                    False
                )
                valid = [
                    row for row in range(len(trials)) if space.is_valid(trials[row])
                ]  # every stack keeps a block
                candidates, trials = [candidates[row] for row in valid], trials[valid]
                best = int(structures.means(problem.fixed, trials, self.measure).argmin())
                part, unit = candidates[best]
                structure[unit], scores[unit] = False, float(step)
                left[part] -= 1
                if step < num_rounds - 1:
                    heal(structure)
        return Choice(structure, scores)

    @contextmanager
    def _working(self, problem: Problem) -> Iterator[tuple[Structures, Heal]]:
        """What removals are scored on, and what is called after each."""
        if not self.healing_steps:
            yield problem.structures, lambda structure: None
            return
        with problem.structures.without_gates():
            model = copy.deepcopy(problem.model)
        distilling = Distilling(problem, model, lr=self.healing_lr, which=HEALING)
        samples = problem.stream(self.healing_batch_size, HEALING)
        problem.structures.ask(problem.fixed)  # the dense model answers, not the copy
        with open_structures(
            model, problem.space, max_rows=problem.structures.max_rows
        ) as structures:

            def heal(structure: Tensor) -> None:
                blocks = problem.space.kept_blocks(structure)
                for _ in range(self.healing_steps):
                    calibration = problem.structures.ask(next(samples))
                    with blocks_removed(model, blocks), structures.gates.bypass():
                        distilling.step(calibration, num_blocks=sum(map(len, blocks.values())))

            yield structures, heal
            problem.structures.num_block_runs += structures.num_block_runs
