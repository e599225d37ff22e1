"""A model run under many structures: what each of them loses against the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_pl.distill import predictions
from tinyfusion_pl.pruning.assignment import Assignment
from tinyfusion_pl.pruning.calls import quiet
from tinyfusion_pl.pruning.gates import DepthGates, remove_gates
from tinyfusion_pl.pruning.surgery import blocks_removed
from tinyfusion_pl.selection.calibration import Calibration, mean_square, take_rows
from tinyfusion_pl.selection.candidates import distinct
from tinyfusion_pl.selection.space import Space

MAX_ROWS = 1024
"""Rows of one forward pass: structures times samples. More rows need more memory."""

BATCH_FIRST = (
    "Every tensor of the call whose first axis is as long as the batch must be one value a "
    "sample, and samples must not influence one another. Choose a number of samples that no "
    "other size equals."
)


class Structures:
    """Runs `model` under structures of `space`; use `open_structures`.

    Attributes:
        num_block_runs: Cost so far: blocks times samples run.
    """

    def __init__(
        self, model: nn.Module, space: Space, gates: DepthGates, *, max_rows: int = MAX_ROWS
    ) -> None:
        self.model, self.space, self.gates, self.max_rows = model, space, gates, max_rows
        self.num_block_runs = 0
        self._checked: set[int] = set()  # numbers of samples

    def ask(self, calibration: Calibration) -> Calibration:
        """Let the dense model answer, once."""
        if calibration.target is None:
            with self.gates.bypass():
                calibration.ask(self.model)
            self.num_block_runs += sum(self.space.num_blocks.values()) * calibration.num_samples
        if calibration.num_samples not in self._checked:  # another number may equal another size
            self._checked.add(calibration.num_samples)
            before = self.num_block_runs
            self.check(calibration)
            self.num_block_runs = before  # no part of a choice
        return calibration

    @torch.no_grad()
    def outputs(
        self, calibration: Calibration, structures: Tensor, index: Tensor, *, shared: bool
    ) -> Any:
        """Outputs of structures for the samples at `index`.

        If not `shared`, each structure runs on its own part of `index`.
        """
        num_samples = len(index) if shared else len(index) // len(structures)
        rows = index.repeat(len(structures)) if shared else index
        args, kwargs = calibration.rows(rows)
        assignment = Assignment(
            self.space.by_path(structures), num_samples=num_samples, shared=shared
        )
        with quiet(self.model), self.gates.masks.assigned(assignment):
            output = self.model(*args, **kwargs)
        outside = sum(
            n - sum(map(len, self.space.units[p])) for p, n in self.space.num_blocks.items()
        )  # blocks in no unit
        self.num_block_runs += assignment.num_runs + outside * len(rows)
        return output

    def per_sample(
        self, calibration: Calibration, structures: Tensor, index: Tensor, measure: str = "distance"
    ) -> Tensor:
        """Measure of each row (R,): `structures` (R, num_units), samples ``index[r]``."""
        parts = zip(structures.split(self.max_rows), index.split(self.max_rows))
        return torch.cat(
            [
                self._measured(
                    calibration, self.outputs(calibration, s, i, shared=False), i, measure
                )
                for s, i in parts
            ]
        )

    def means(
        self, calibration: Calibration, structures: Tensor, measure: str = "distance"
    ) -> Tensor:
        """Mean over the calibration's samples for each structure: (S,) float64.

        Args:
            calibration: The samples; for ``"distance"`` the dense model's answers are asked for
                where they are missing.
            structures: (S, num_units) bool.
            measure: ``"distance"`` to the dense model's output, or ``"loss"``.
        """
        if measure == "distance":
            self.ask(calibration)
        index = torch.arange(calibration.num_samples)
        order = lexicographic(structures)
        found, size = (
            torch.empty(len(structures), dtype=torch.float64),
            max(self.max_rows // len(index), 1),
        )
        for part in order.split(size):
            output = self.outputs(calibration, structures[part], index, shared=True)
            found[part] = (
                self._measured(calibration, output, index.repeat(len(part)), measure)
                .view(len(part), -1)
                .double()
                .mean(1)
                .cpu()
            )
        return found

    @torch.no_grad()
    def check(self, calibration: Calibration) -> None:
        """Check structures in one batch against really cut blocks.

        Compares one with early and one with late drops.

        Raises:
            ValueError: when they do not: then samples cannot be told apart in the inputs or
                influence one another, or what is around the blocks depends on their number or
                place.
        """
        self.ask(calibration)
        places = torch.arange(self.space.num_units)
        structures = distinct(
            [
                torch.ones_like(places, dtype=torch.bool),
                self.space.top(places),
                self.space.top(-places),
            ]
        )
        index = torch.arange(min(calibration.num_samples, max(self.max_rows // len(structures), 1)))
        args, kwargs = calibration.rows(index)
        expected = []
        for structure in structures:
            with (
                quiet(self.model),
                self.gates.bypass(),
                blocks_removed(self.model, self.space.kept_blocks(structure)),
            ):
                expected.append(self.model(*args, **kwargs))
        try:
            output = self.outputs(calibration, structures, index, shared=True)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"The model could not be run on its samples repeated: {error} {BATCH_FIRST}"
            ) from error
        for at, (structure, alone) in enumerate(zip(structures, expected)):
            rows = take_rows(
                output, at * len(index) + torch.arange(len(index)), len(structures) * len(index)
            )
            difference, scale = float(mean_square(rows, alone).mean()), _mean_size(alone)
            if not difference <= 1e-7 * max(scale, 1e-12):
                kept = self.space.kept_blocks(structure)
                raise ValueError(
                    f"{type(self.model).__name__} gives other outputs for several structures in "
                    f"one batch (mean squared difference {difference:.3g}, where outputs have "
                    f"{scale:.3g}) than "
                    + (
                        f"with all but {kept} cut out: an input or setting goes to blocks by "
                        "their place. Leave it out or name other stacks."
                        if at
                        else f"for one alone. {BATCH_FIRST}"
                    )
                )

    @contextmanager
    def without_gates(self) -> Iterator[None]:
        """Inside, the model is an ordinary one, to be copied."""
        for gated in self.gates.gated_forwards:
            gated.remove()
        try:
            yield
        finally:
            for gated in self.gates.gated_forwards:
                gated.install()

    @staticmethod
    def _measured(calibration: Calibration, output: Any, index: Tensor, measure: str) -> Tensor:
        return (
            calibration.distances(output, index)
            if measure == "distance"
            else calibration.losses(output, index)
        )


@contextmanager
def open_structures(
    model: nn.Module, space: Space, *, max_rows: int = MAX_ROWS
) -> Iterator[Structures]:
    """Install gates on `model` that run any structure of `space`; remove them at the end."""
    whole = {path: f"{len(units)}:{len(units)}" for path, units in space.units.items()}
    gates = DepthGates(model, whole, stacks=space.paths, units=space.units)
    try:
        yield Structures(model, space, gates, max_rows=max_rows)
    finally:
        remove_gates(model)


def _mean_size(output: Any) -> float:
    """Mean square of an output, averaged over its tensors."""
    return sum(float(each.float().square().mean()) for each in predictions(output)) / len(
        predictions(output)
    )


def lexicographic(structures: Tensor) -> Tensor:
    """Order in which neighbors share the longest prefixes."""
    order = torch.arange(len(structures))
    for column in reversed(range(structures.shape[1])):
        order = order[structures[order, column].long().argsort(stable=True)]
    return order
